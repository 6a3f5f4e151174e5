"""BLEU, METEOR and CIDEr: known answers where their libraries are installed, clear errors where not."""

import sys

import pytest

from peft_read.metrics import bleu_score, cider_score, meteor_score


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    # 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 n-grams, equal lengths
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu_score(["a b c d x"], ["a b c d y"]) == pytest.approx(expected)
    # punctuation: four tokens by sacrebleu's own tokeniser, three as given
    assert bleu_score(["bikes, a b"], ["bikes, a b"]) == pytest.approx(100.0)
    assert bleu_score(["bikes, a b"], ["bikes, a b"], tokenize="none") < 100.0


def test_cider_of_equal_and_of_unrelated_texts():
    pytest.importorskip("pycocoevalcap")
    texts = ["learn how to play the mandolin", "repair an old bike chain", "plant a perennial garden now"]
    assert cider_score(texts, texts) == pytest.approx(10.0)
    assert cider_score(texts, [*texts[1:], texts[0]]) == pytest.approx(0.0)


def test_meteor_by_hand():
    pytest.importorskip("nltk")
    try:
        score = meteor_score(["a b c d"], ["a b c e"])
    except ImportError as error:
        pytest.skip(str(error))
    # three of four words in one chunk: F = 3/4, penalty 0.5 (1/3)^3
    assert score == pytest.approx(100 * 0.75 * (1 - 0.5 / 27))


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        (bleu_score, "sacrebleu", "sacrebleu"),
        (meteor_score, "nltk.corpus", "nltk"),
        (cider_score, "pycocoevalcap.cider.cider", "pycocoevalcap"),
    ],
)
def test_failures(monkeypatch, metric, module, package):
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        metric(["a"], ["a", "b"])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        metric(["a"], ["a"])
