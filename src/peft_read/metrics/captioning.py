"""BLEU, METEOR and CIDEr through the libraries that define them; none is a dependency of this project."""

from __future__ import annotations

from collections.abc import Sequence

from .summarization import check_texts

__all__ = ["bleu_score", "cider_score", "meteor_score"]


def bleu_score(predictions: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> float:
    """Corpus BLEU-4 by sacrebleu, one reference a prediction.

    Args:
        predictions: one text a pair.
        references: one text a pair.
        tokenize: sacrebleu's tokeniser; `"none"` splits at white space, for text that is tokenised already.

    Returns:
        0 to 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, or something is no text.
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
        predictions: one text a pair.
        references: one text a pair.

    Returns:
        0 to 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, or something is no text.
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


def cider_score(predictions: Sequence[str], references: Sequence[str]) -> float:
    """CIDEr by pycocoevalcap, on texts split at white space, one reference a prediction.

    Document frequencies come from the references at hand, so the score depends on the whole set.

    Args:
        predictions: one text a pair.
        references: one text a pair.

    Returns:
        0 to 10; often published times 100.

    Raises:
        ValueError: the numbers of texts differ or are zero, or something is no text.
        ImportError: pycocoevalcap is not installed.
    """
    check_texts(predictions, references)
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError("cider_score needs the package pycocoevalcap: pip install pycocoevalcap") from error
    true = {i: [text] for i, text in enumerate(references)}
    score, _ = Cider().compute_score(true, {i: [text] for i, text in enumerate(predictions)})
    return float(score)
