"""ROUGE in both variants and content F1: known answers, reference values, failures."""

import itertools
import json
import lzma
import sys

import pytest

from peft_read.metrics import content_f1, rouge_scores
from peft_read.metrics.summarization import _lcs_length


def test_easy_rouge_by_hand():
    # 3 of 4 words and of 5 words, 1 of 3 and of 4 bigrams, subsequence "a b d"
    scores = rouge_scores(["a b x d"], ["a b c d d"], variant="easy_rouge")
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 200 / 7, "rougeL": 200 / 3})


def test_easy_rouge_counts_punctuation_and_case():
    assert rouge_scores(["Hello ."], ["hello ."], variant="easy_rouge")["rouge1"] == 50.0
    assert rouge_scores(["Hello ."], ["hello ."], variant="rouge_score")["rouge1"] == 100.0


def test_repeated_words_are_counted_once_per_match():
    assert rouge_scores(["a a a a"], ["a b"], variant="easy_rouge")["rouge1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("texts", [("", "a b"), ("a", ""), ("", "")])
def test_empty_texts_score_zero(texts):
    assert set(rouge_scores([texts[0]], [texts[1]], variant="easy_rouge").values()) == {0.0}


def test_longest_common_subsequence_against_enumeration():
    for a in itertools.product("abc", repeat=4):
        for b in (tuple("abcab"), tuple("ccba"), tuple("a"), ()):
            subsequences = (chosen for size in range(5) for chosen in itertools.combinations(range(4), size))
            best = 0
            for chosen in subsequences:
                rest = iter(b)
                if all(a[i] in rest for i in chosen):
                    best = max(best, len(chosen))
            assert _lcs_length(list(a), list(b)) == best


@pytest.mark.parametrize("variant", ["rouge_score", "easy_rouge"])
def test_rouge_equals_the_reference_implementations(reference_data, variant):
    golden = json.loads(reference_data("golden/metrics/rouge.json").read_text())
    expected = golden[{"rouge_score": "rouge_score_0_1_2", "easy_rouge": "easy_rouge_0_2_2"}[variant]]
    predictions = [pair["hypothesis"] for pair in golden["pairs"]]
    references = [pair["reference"] for pair in golden["pairs"]]
    assert rouge_scores(predictions, references, variant) == pytest.approx(expected["mean_f1_x100"], abs=1e-9)
    for prediction, reference, triples in zip(predictions, references, expected["per_pair"], strict=True):
        f1 = {name: 100 * triple[2] for name, triple in triples.items()}
        assert rouge_scores([prediction], [reference], variant) == pytest.approx(f1, abs=1e-9)


@pytest.mark.parametrize(
    ("variant", "published"), [("easy_rouge", (67.96, 51.40, 63.25)), ("rouge_score", (66.63, 50.40, 61.85))]
)
def test_the_published_how2_system(reference_data, variant, published):
    predictions, references = (
        lzma.decompress(reference_data(f"data/how2/{name}.xz").read_bytes()).decode().splitlines()
        for name in ("Bart_forget_gate_img_TF.txt", "test.tgt")
    )
    scores = rouge_scores(predictions, references, variant)
    assert [round(scores[name], 2) for name in ("rouge1", "rouge2", "rougeL")] == list(published)


def test_rouge_failures(monkeypatch):
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        rouge_scores(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 predictions and 0 references"):
        rouge_scores([], [])
    with pytest.raises(ValueError, match="must be 'rouge_score' or 'easy_rouge', not 'rouge'"):
        rouge_scores(["a"], ["a"], "rouge")
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        rouge_scores(["a"], ["a"])


ALIGNMENT = """Alignment\t1\t0\t0
learn to fix bikes quickly
how to fix a bike
Reference\t\tHypothesis\tModule\tScore
1:1\t\t\t1:1\t\t\t0\t\t\t1.0
2:1\t\t\t2:1\t\t\t0\t\t\t1.0
4:1\t\t\t3:1\t\t\t1\t\t\t0.6

Alignment\t2\t0\t0
zebra
quilt
Reference\t\tHypothesis\tModule\tScore

"""


def test_content_f1_by_hand():
    # item 1: "to" goes; reference bag {how, fix, a, bike}, hypothesis bag {learn, fix, bikes, quickly}, 2 of 4 each
    assert content_f1(ALIGNMENT) == pytest.approx((0.5 + 0.0) / 2)


def test_content_f1_of_a_phrase_counts_its_tokens():
    text = ALIGNMENT.split("Alignment\t2")[0].replace("4:1\t\t\t3:1", "3:2\t\t\t3:1")
    precision, recall = 3 / 4, 2 / 4
    assert content_f1(text) == pytest.approx(2 * precision * recall / (precision + recall))


def test_content_f1_failures():
    with pytest.warns(UserWarning, match="its last item is left out"):
        assert content_f1(ALIGNMENT + "Alignment\t3\nx\nx\nReference\n") == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no item"):
        content_f1("")
    with pytest.raises(ValueError, match="item 0 of the alignment text has 2 lines"):
        content_f1("a\nb\n\n")
