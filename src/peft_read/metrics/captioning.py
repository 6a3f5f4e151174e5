"""BLEU, METEOR and CIDEr through the libraries that define them; none is a dependency of this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..values import shown
from .summarization import check_texts

__all__ = ["bleu_score", "caption_scores", "cider_score", "cider_scores", "meteor_score"]


def bleu_score(predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> float:
    """Corpus BLEU-4 by sacrebleu, one reference per prediction.

    Args:
        predictions: one text per pair.
        references: one text per pair.
        tokenize: sacrebleu's tokeniser; `"none"` splits at white space, for text that is tokenised already.

    Returns:
        0 to 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, or an entry that is not a string.
        ImportError: sacrebleu is not installed.
    """
    check_texts(predictions, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("bleu_score needs the package sacrebleu: pip install sacrebleu") from error
    return sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokenize).score


def meteor_score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """METEOR by nltk: exact words, stems and WordNet synonyms; mean over pairs of texts split at white space.

    It is the METEOR of 2005 as nltk computes it, not the Java program METEOR 1.5.

    Args:
        predictions: one text per pair.
        references: one text per pair.

    Returns:
        0 to 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, or an entry that is not a string.
        ImportError: nltk or its WordNet data is not installed.
    """
    check_texts(predictions, references)
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        wordnet.ensure_loaded()
    except ImportError as error:
        raise ImportError("meteor_score needs the package nltk: pip install nltk") from error
    except LookupError as error:
        raise ImportError("meteor_score needs WordNet: python -m nltk.downloader wordnet") from error
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(single_meteor_score(b.split(), a.split()) for a, b in pairs) / len(references)


def cider_score(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """The mean of `cider_scores`: CIDEr of the whole set, from 0 to 10; often published times 100."""
    scores = cider_scores(predictions, references)
    return sum(scores) / len(scores)


def cider_scores(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
    """CIDEr of each prediction by pycocoevalcap, on texts split at white space.

    Document frequencies come from the references at hand, so each score depends on the whole set.

    Args:
        predictions: one text per pair.
        references: one text per prediction, or several.

    Returns:
        0 to 10 for each.

    Raises:
        ValueError: the numbers of texts differ or are zero, or an entry that is not a string.
        ImportError: pycocoevalcap is not installed.
    """
    true, said = _captions(predictions, references)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError("CIDEr needs the package pycocoevalcap: pip install pycocoevalcap") from error
    _, scores = Cider().compute_score(true, said)
    return [float(score) for score in scores]


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    tokenizer: Callable[[str], Sequence[str]] | None = None,
) -> dict[str, float]:
    """BLEU-1 to 4, ROUGE-L and CIDEr by pycocoevalcap, as captions are scored.

    The official numbers are computed on the words of the Stanford tokeniser, a Java program (pycocoevalcap's
    `PTBTokenizer`: lower case, punctuation left out); pass texts that were tokenised with it, or a `tokenizer`.

    Args:
        predictions: one text per pair.
        references: one text per prediction, or several.
        tokenizer: from a text to its words; None: the texts are split at white space.

    Returns:
        `Bleu_1` to `Bleu_4` and `ROUGE_L` from 0 to 1, `CIDEr` from 0 to 10.

    Raises:
        ValueError: the numbers of texts differ or are zero, or an entry that is not a string.
        ImportError: pycocoevalcap is not installed.

    Example:
        >>> caption_scores(["a dog runs"], [["a dog runs", "the dog is fast"]])["ROUGE_L"]  # doctest: +SKIP
        1.0
    """
    true, said = _captions(predictions, references)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("caption_scores needs the package pycocoevalcap: pip install pycocoevalcap") from error
    if tokenizer is not None:
        true, said = (
            {i: [" ".join(tokenizer(text)) for text in texts] for i, texts in d.items()} for d in (true, said)
        )
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    scores = {f"Bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)}
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        scores[name] = float(scorer.compute_score(true, said)[0])
    return scores


def _captions(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions by index, each a list of strings."""
    if isinstance(references, str) or not hasattr(references, "__len__"):
        raise ValueError(f"references must be a list of strings, or of lists of strings, not {shown(references)}")
    several = [[given] if isinstance(given, str) else given for given in references]
    check_texts(predictions, ["" for _ in several])
    for position, texts in enumerate(several):
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"reference {position} must be a string or several, not {shown(texts)}")
    return {i: list(texts) for i, texts in enumerate(several)}, {i: [text] for i, text in enumerate(predictions)}
