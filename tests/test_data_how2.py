"""The How2 layout: reading, collating, the feature store, the generated How2-mini, and every kind of bad input."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_read.data import (
    HOW2_MINI_DOMAINS,
    FeatureStore,
    How2Collator,
    generate_how2_mini,
    how2_mini_talk,
    load_how2,
    write_how2_mini,
)


@pytest.fixture
def folder(tmp_path):
    clips = {"sum_train": generate_how2_mini(12, seed=1), "sum_test": generate_how2_mini(5, seed=2)}
    return write_how2_mini(tmp_path / "how2", clips)


def word_tokenizer(*texts):
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_written_files_are_read_back(folder):
    clips = generate_how2_mini(12, seed=1)
    data = load_how2(folder, "sum_train")
    assert data["video_id"][:] == [clip.video_id for clip in clips]
    assert data["transcript"][:] == [clip.transcript for clip in clips]
    assert data["summary"][:] == [clip.summary for clip in clips]
    store = FeatureStore(folder / "video_features")
    assert np.array_equal(store[clips[3].video_id], clips[3].features)
    assert store.check(data["video_id"]) == 64


def test_subsets_are_random_with_a_seed_or_the_first_lines(folder):
    ids = load_how2(folder, "sum_train")["video_id"][:]
    first = load_how2(folder, "sum_train", num_samples=4, subset="first")["video_id"][:]
    assert first == ids[:4]
    draws = [load_how2(folder, "sum_train", num_samples=4, seed=seed)["video_id"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[2]) <= set(ids)


def test_how2_mini_is_as_documented():
    clips = generate_how2_mini(50, seed=3)
    assert [clip.summary for clip in clips] == [clip.summary for clip in generate_how2_mini(50, seed=3)]
    domain = HOW2_MINI_DOMAINS["gardening"]
    for clip in clips:
        assert 3 <= len(clip.steps) <= 6
        words = clip.transcript.split()
        assert all(noun in words for _, noun in clip.steps)
        assert not any(verb in words for verb in domain.verbs), "the transcript must not tell what is done"
        named = {noun for looks in domain.nouns for noun in looks if noun in words}
        assert len(named) > len(clip.steps), "something named must remain untouched"
        told = [word for word in clip.summary.split() if word in domain.verbs]
        assert told == [verb for verb, _ in clip.steps]
    in_order = [[w for w in c.transcript.split() if w in {n: v for v, n in c.steps}] for c in clips]
    assert any(order != [noun for _, noun in c.steps] for order, c in zip(in_order, clips, strict=True))


def test_how2_mini_words_belong_to_one_domain_and_the_talk_uses_all():
    verbs = [verb for domain in HOW2_MINI_DOMAINS.values() for verb in domain.verbs]
    nouns = [noun for domain in HOW2_MINI_DOMAINS.values() for pair in domain.nouns for noun in pair]
    assert len(set(verbs)) == 80
    assert len(set(nouns)) == 120, "half of gardening's objects are known from other domains"
    talk = set(" ".join(how2_mini_talk(4000, seed=0)).split())
    assert set(verbs) | set(nouns) <= talk
    with pytest.raises(ValueError, match="unknown How2-mini domains"):
        generate_how2_mini(1, seed=0, domains=["knitting"])


def test_a_batch_has_the_original_preparation():
    features = {"a": np.ones((5, 3), np.float32), "b": np.full((2, 3), 2, np.float32)}
    items = [
        {"video_id": "a", "transcript": "x y", "summary": "u"},
        {"video_id": "b", "transcript": "y x x y x", "summary": "u v u"},
    ]
    tokenizer = word_tokenizer("u v x y")  # ids 4 to 7
    collator = How2Collator(
        tokenizer, features, decoder_start_token_id=0, max_source_length=4, max_target_length=2, max_frames=4
    )
    batch = collator(items)
    assert batch["input_ids"].tolist() == [[6, 7, 1, 1], [7, 6, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 4, 1], [0, 4, 5]]
    assert batch["labels"].tolist() == [[4, 2, -100], [4, 5, 2]]
    assert batch["video_features"].shape == (2, 4, 3)
    assert batch["video_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["video_features"][1, 2:].abs().max() == 0
    collator.zero_video = True
    zeroed = collator(items)
    assert zeroed["video_features"].abs().max() == 0
    assert torch.equal(zeroed["video_mask"], batch["video_mask"])


def test_an_archive_reads_like_files(tmp_path):
    rows = np.array([[10, -20], [30, 40], [50, 60]], np.int8)
    np.savez(
        tmp_path / "archive.npz",
        ids=np.array(["a", "b"]),
        offsets=np.array([0, 1, 3]),
        features=rows,
        scale=np.array([0.1, 0.5, 1.0], np.float32),
    )
    store = FeatureStore(tmp_path / "archive.npz")
    assert list(store) == ["a", "b"]
    assert len(store) == 2
    assert np.allclose(store["a"], [[1, -2]])
    assert np.allclose(store["b"], [[15, 20], [50, 60]])
    (tmp_path / "files").mkdir()
    np.savez(tmp_path / "files" / "a.npz", features=np.array([[1.0, -2.0]]))
    assert np.allclose(FeatureStore(tmp_path / "files")["a"], [[1, -2]])


def rewrite(path, change):
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + ("\n" if lines else ""))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tran.tok.txt", lambda lines: lines.clear(), r"tran\.tok\.txt is empty"),
        ("tran.tok.txt", lambda lines: lines.__setitem__(2, " no id here"), r"tran\.tok\.txt, line 3: no video id"),
        ("desc.tok.txt", lambda lines: lines.__setitem__(4, ""), r"desc\.tok\.txt, line 5: no video id"),
        (
            "desc.tok.txt",
            lambda lines: lines.__setitem__(1, lines[1].split()[0]),
            r"desc\.tok\.txt, line 2: the text of 'clip1_1' is empty",
        ),
        ("desc.tok.txt", lambda lines: lines.pop(), r"1 ids are in only one of"),
        ("tran.tok.txt", lambda lines: lines.append(lines[0]), r"line 13: 'clip1_0' was already given"),
    ],
)
def test_bad_text_files_are_named_by_line(folder, file, change, message):
    rewrite(folder / "sum_train" / file, change)
    with pytest.raises(ValueError, match=message):
        load_how2(folder, "sum_train")


def test_missing_files_and_splits_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"sum_cv does not exist; splits in .*sum_test.*sum_train"):
        load_how2(folder, "sum_cv")
    (folder / "sum_test" / "desc.tok.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"desc\.tok\.txt does not exist"):
        load_how2(folder, "sum_test")
    with pytest.raises(ValueError, match=r"num_samples=99 is outside 1 \.\. 12"):
        load_how2(folder, "sum_train", num_samples=99)
    with pytest.raises(ValueError, match="neither 'random' nor 'first'"):
        load_how2(folder, "sum_train", num_samples=2, subset="last")
    with pytest.raises(FileNotFoundError, match="neither a folder of features nor"):
        FeatureStore(folder / "nothing")


def test_bad_features_are_listed_by_id(folder):
    data = load_how2(folder, "sum_train")
    features = folder / "video_features"
    (features / "clip1_0.npy").unlink()
    np.save(features / "clip1_1.npy", np.zeros((4, 63), np.float32))
    broken = np.zeros((4, 64), np.float32)
    broken[2, 5] = np.nan
    np.save(features / "clip1_2.npy", broken)
    np.save(features / "clip1_3.npy", np.zeros((0, 64), np.float32))
    with pytest.raises(ValueError) as error:
        FeatureStore(features).check(data["video_id"], width=64)
    for part in ("have no features: clip1_0", "clip1_1 (63)", "clip1_2 (frame 2)", "have no frame: clip1_3"):
        assert part in str(error.value)
    with pytest.raises(KeyError, match="no features of 'clip1_0'"):
        FeatureStore(features)["clip1_0"]
    np.save(features / "flat.npy", np.zeros(4))
    with pytest.raises(ValueError, match=r"features are \(frames, width\)"):
        FeatureStore(features)["flat"]
    np.savez(folder / "bad.npz", ids=np.array(["a"]))
    with pytest.raises(ValueError, match=r"no arrays \['features', 'offsets'\]"):
        FeatureStore(folder / "bad.npz")
