"""Metrics of the How2 literature: two definitions of ROUGE that differ by about 1.3 points, and content F1."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from ..values import shown

__all__ = ["check_texts", "content_f1", "rouge_scores"]

Tokenizer = Callable[[str], Sequence[str]]


def rouge_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    variant: str = "rouge_score",
    *,
    tokenizer: Tokenizer | None = None,
) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one reference per prediction: F1 x 100, plain mean over the pairs.

    The How2 literature uses two definitions, and a report must name which:

    * `"rouge_score"`: the package of that name (and `evaluate`'s `rouge` without its random resampling): lower-cased
      words of letters and digits, no stemming.
    * `"easy_rouge"`: words as split at white space, punctuation included; the numbers of Yu et al. (EMNLP 2021).

    The words of `"rouge_score"` are ASCII letters and digits: a text in another script has none and
    scores 0, with a warning; pass a `tokenizer` there, such as `str.split`, or `list` for scripts
    that write no spaces.

    Args:
        predictions: one text per pair.
        references: one text per pair.
        variant: `"rouge_score"` or `"easy_rouge"`.
        tokenizer: from a text to its words, in place of the variant's own.

    Returns:
        `{"rouge1": ..., "rouge2": ..., "rougeL": ...}`, each from 0 to 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, an entry that is not a string (its index is named), or the
            variant is unknown.
        ImportError: the variant needs the package rouge-score and it is not installed.

    Example:
        >>> rouge_scores(["learn to play"], ["learn to sing"], variant="easy_rouge")["rouge2"]
        50.0
    """
    check_texts(predictions, references)
    if variant == "easy_rouge":
        split = tokenizer or str.split
        words = [(_words(a, split), _words(b, split)) for a, b in zip(predictions, references, strict=True)]
        pairs = [_easy_rouge(a, b) for a, b in words]
    elif variant == "rouge_score":
        pairs = _rouge_score(predictions, references, tokenizer)
    else:
        raise ValueError(f"variant must be 'rouge_score' or 'easy_rouge', not {variant!r}")
    return {name: 100 * sum(pair[name] for pair in pairs) / len(pairs) for name in ("rouge1", "rouge2", "rougeL")}


def check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    """One text per prediction and per reference, and at least one pair.

    Raises:
        ValueError: anything else, by the number of the text.
    """
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str) or not hasattr(texts, "__len__"):
            raise ValueError(f"{name} must be a list of strings, not {shown(texts)}")
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: pass one reference per prediction, and "
            "at least one pair"
        )
    for name, texts in (("prediction", predictions), ("reference", references)):
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name} {number} must be a string, not {shown(text)}")


def _words(text: str, split: Tokenizer) -> list[str]:
    words = split(text)
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"the tokenizer must give a list of words, not {shown(words)}")
    return list(words)


def _rouge_score(
    predictions: Sequence[str], references: Sequence[str], tokenizer: Tokenizer | None
) -> list[dict[str, float]]:
    try:
        from rouge_score import tokenizers
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "variant='rouge_score' needs the package rouge-score: pip install rouge-score, or use "
            "variant='easy_rouge', another definition that needs nothing"
        ) from error

    class Own(tokenizers.Tokenizer):
        """The given tokenizer with the interface of rouge-score."""

        def tokenize(self, text: str) -> list[str]:
            return _words(text, tokenizer or str.split)

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False, tokenizer=None if tokenizer is None else Own())
    if tokenizer is None:
        _warn_of_lost_texts([*predictions, *references], tokenizers.DefaultTokenizer(use_stemmer=False).tokenize)
    scores = (scorer.score(b, a) for a, b in zip(predictions, references, strict=True))
    return [{name: score.fmeasure for name, score in pair.items()} for pair in scores]


def _warn_of_lost_texts(texts: Sequence[str], tokenize: Callable[[str], Sequence[str]]) -> None:
    # Only a text with letters outside ASCII can lose all of its words, so that the others need no second pass.
    lost = [text for text in texts if not text.isascii() and any(map(str.isalnum, text)) and not tokenize(text)]
    if lost:
        warnings.warn(
            f"{len(lost)} of {len(texts)} texts have no word of ASCII letters or digits and score 0, such as "
            f"{shown(lost[0])}; pass tokenizer=, for example str.split",
            stacklevel=4,
        )


def _easy_rouge(prediction: list[str], reference: list[str]) -> dict[str, float]:
    scores = {}
    for size in (1, 2):
        predicted, expected = _ngrams(prediction, size), _ngrams(reference, size)
        scores[f"rouge{size}"] = _f1((predicted & expected).total(), predicted.total(), expected.total())
    scores["rougeL"] = _f1(_lcs_length(prediction, reference), len(prediction), len(reference))
    return scores


def _ngrams(words: list[str], size: int) -> Counter:
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _f1(matches: int, predicted: int, expected: int) -> float:
    if not matches:
        return 0.0
    precision, recall = matches / predicted, matches / expected
    return precision * recall / (0.5 * precision + 0.5 * recall)


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table at a time as the bits of one integer.

    Bit i of `row` is 0 where the table's row grows by one at column i (Hyyrö, "Bit-parallel LCS-length computation
    revisited", 2004).
    """
    columns: dict[str, int] = {}
    for i, word in enumerate(a):
        columns[word] = columns.get(word, 0) | 1 << i
    everything = row = (1 << len(a)) - 1
    for word in b:
        matches = row & columns.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


# Words of the How2 summaries' template, which say nothing about a video.
_TEMPLATE_WORDS = frozenset(
    {"in", "a", "this", "to", "free", "the", "video", "and", "learn", "from", "on", "with", "how", "tips", "for", "of"}
    | {"expert", "an"}
)


def content_f1(alignment_text: str) -> float:
    """Content F1 of VG-GPLMs, from the alignments that METEOR 1.5 writes.

    An item of the text is a title line, the hypothesis, the reference, a header line, rows that start with
    `<reference position>:<length>` and `<hypothesis position>:<length>`, and a blank line. Aligned template words
    ("in a this to free ...") are left out. The original counts aligned TOKENS over different WORDS, so the numbers
    may exceed one, and calls hypothesis coverage recall and reference coverage precision; F1 is the same either way.

    Args:
        alignment_text: the content of METEOR's alignment file, with the blank line after its last item.

    Returns:
        The mean over items, as a fraction. An item without content words or without a match counts as 0 (the
        original divides by zero).

    Raises:
        ValueError: there is no item, or a line is not where the format has it.
    """
    if not isinstance(alignment_text, str):
        raise ValueError(f"content_f1 takes the content of METEOR's alignment file, not {shown(alignment_text)}")
    items: list[list[str]] = [[]]
    for line in io.StringIO(alignment_text, newline=None):
        if line == "\n":
            items.append([])
        else:
            items[-1].append(line)
    if items.pop():
        warnings.warn(
            "the alignment text does not end with a blank line; as in the original, its last item is left out",
            stacklevel=2,
        )
    if not items:
        raise ValueError("no item in the alignment text: an item ends with a blank line")
    return sum(_content_f1(number, item) for number, item in enumerate(items)) / len(items)


def _alignment(item: int, row: str, reference: int, hypothesis: int) -> tuple[int, int, int, int]:
    """Position and length in the reference, position and length in the hypothesis."""
    match = re.match(r"(\d+):(\d+)\s+(\d+):(\d+)(\s|$)", row)
    there, length_there, here, length_here = map(int, match.groups()[:4]) if match else (0, 0, 0, 0)
    inside = there + length_there <= reference and here + length_here <= hypothesis
    if not (length_there and length_here and inside):
        raise ValueError(
            f"item {item} of the alignment text: {shown(row.strip())} is not a row '<reference position>:<length> "
            f"<hypothesis position>:<length> ...' of a reference of {reference} and a hypothesis of {hypothesis} words"
        )
    return there, length_there, here, length_here


def _content_f1(number: int, item: list[str]) -> float:
    if len(item) < 4:
        raise ValueError(
            f"item {number} of the alignment text has {len(item)} lines; expected are a title, the hypothesis, the "
            "reference, a header and the alignment rows"
        )
    hypothesis, reference = item[1].split(), item[2].split()
    aligned = {"hypothesis": 0, "reference": 0}
    left_out: dict[str, set[str]] = {"hypothesis": set(), "reference": set()}
    for row in item[4:]:
        there, length_there, here, length_here = _alignment(number, row, len(reference), len(hypothesis))
        if reference[there] in _TEMPLATE_WORDS and length_there == 1:
            left_out["reference"].add(reference[there])
            left_out["hypothesis"].add(hypothesis[here])
        else:
            aligned["reference"] += length_there
            aligned["hypothesis"] += length_here
    words = {
        "hypothesis": set(hypothesis) - left_out["hypothesis"],
        "reference": set(reference) - left_out["reference"],
    }
    if not all(words.values()) or not all(aligned.values()):
        return 0.0
    coverage = {side: aligned[side] / len(words[side]) for side in words}
    product = coverage["reference"] * coverage["hypothesis"]
    return 2 * product / (coverage["reference"] + coverage["hypothesis"])
