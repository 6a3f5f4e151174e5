"""Readers of the grounding datasets, clip and text features, pair sampling, collators, weak labels, and bad input."""

import json
import lzma

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from peft_read.data import (
    TVSUM_DOMAINS,
    ClipFeatures,
    FeatureStore,
    MomentDetrCollator,
    PooledFeatures,
    SentenceEncoder,
    TextFeatures,
    UMTCollator,
    annotated_pairs,
    ground_truth_records,
    l2_normalize,
    leave_one_video_out,
    load_qvhighlights,
    load_tvsum,
    load_youtube_highlights,
    low_resource_split,
    moments_of_similar_clips,
    pool_frames,
    pseudo_queries,
    query_similarity,
    ranked_pairs,
    temporal_endpoints,
    window_pairs,
    write_feature_archive,
)
from peft_read.metrics import evaluate_qvhighlights, tvsum_map
from peft_read.models import (
    MomentDetrConfig,
    MomentDetrForTemporalGrounding,
    UMTConfig,
    UMTForTemporalGrounding,
)

ROW = {
    "qid": 7,
    "query": "a dog runs",
    "vid": "v_0.0_20.0",
    "duration": 20,
    "relevant_windows": [[4, 10], [12, 14]],
    "relevant_clip_ids": [2, 3, 4, 6],
    "saliency_scores": [[4, 4, 3], [1, 0, 2], [3, 3, 3], [2, 2, 2]],
}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_qvhighlights_is_read_with_clip_scores_from_plain_and_compressed_files(tmp_path):
    path = write_jsonl(tmp_path / "highlight_val_release.jsonl", [ROW])
    data = load_qvhighlights(path)
    scores = np.zeros(10)
    scores[[2, 3, 4, 6]] = np.array([11, 3, 9, 6]) / 12
    assert np.allclose(data[0]["clip_scores"], scores)
    assert ground_truth_records(data) == [{name: ROW[name] for name in ground_truth_records(data)[0]}]
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "a.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    assert load_qvhighlights(tmp_path / "small" / "a.jsonl")[:] == data[:]


def test_queries_without_labels_are_read_only_when_asked_for(tmp_path):
    row = {name: ROW[name] for name in ("qid", "query", "vid", "duration")}
    path = write_jsonl(tmp_path / "test.jsonl", [row])
    assert load_qvhighlights(path, require_labels=False)[0]["clip_scores"] is None
    with pytest.raises(ValueError, match=r"line 1: no 'relevant_windows'"):
        load_qvhighlights(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty"),
        ([{**ROW, "saliency_scores": [[1, 1, 1]]}], "qid 7: 4 relevant clips, but 1 saliency scores"),
        ([ROW, ROW], "qid 7 appears twice"),
        ([{**ROW, "relevant_windows": []}], "qid 7 has no labels"),
        ([[1]], "a JSON object was expected"),
    ],
)
def test_bad_annotations_are_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        load_qvhighlights(write_jsonl(tmp_path / "a.jsonl", records))


def test_missing_and_broken_files_are_named(tmp_path):
    write_jsonl(tmp_path / "highlight_train_release.jsonl", [ROW])
    with pytest.raises(FileNotFoundError, match=r"annotations in its folder: \['highlight_train_release\.jsonl'\]"):
        load_qvhighlights(tmp_path / "highlight_val_release.jsonl")
    (tmp_path / "b.jsonl").write_text('{"qid": 1}\n{"qid":\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: no 'query'"):
        load_qvhighlights(tmp_path / "b.jsonl")


def test_the_low_resource_split_keeps_sources_apart(tmp_path):
    rows = [{**ROW, "qid": i, "vid": f"source{i // 3}_{i % 3}.0_9.0"} for i in range(60)]
    data = load_qvhighlights(write_jsonl(tmp_path / "a.jsonl", rows))
    train, validation = low_resource_split(data, num_train=31, num_validation=10, seed=1)
    assert (len(train), len(validation)) == (31, 10)
    assert not {vid.split("_")[0] for vid in train["vid"]} & {vid.split("_")[0] for vid in validation["vid"]}
    again, other = (low_resource_split(data, num_train=31, seed=s, num_validation=None)[0] for s in (1, 2))
    assert again["qid"][:] == train["qid"][:] != other["qid"][:]
    with pytest.raises(ValueError, match="num_train=31 and num_validation=40 cannot be drawn from 60 queries"):
        low_resource_split(data, num_train=31, num_validation=40)


def test_training_parts_of_several_sizes_are_nested_and_share_one_validation_part(tmp_path):
    rows = [{**ROW, "qid": i, "vid": f"source{i // 3}_{i % 3}.0_9.0"} for i in range(90)]
    data = load_qvhighlights(write_jsonl(tmp_path / "a.jsonl", rows))
    parts = {n: low_resource_split(data, num_train=n, num_validation=20, seed=3, pool=31) for n in (5, 17, 31)}
    small, middle, large = (set(train["qid"]) for train, _ in parts.values())
    assert small < middle < large and (len(small), len(middle), len(large)) == (5, 17, 31)
    selected = [validation["qid"][:] for _, validation in parts.values()]
    assert selected[0] == selected[1] == selected[2]
    sources = [{vid.split("_")[0] for vid in part["vid"]} for part in parts[31]]
    assert not sources[0] & sources[1]
    assert parts[31][0]["qid"][:] == low_resource_split(data, num_train=31, num_validation=20, seed=3)[0]["qid"][:]
    with pytest.raises(ValueError, match="pool=4 is smaller than num_train=5"):
        low_resource_split(data, num_train=5, pool=4)


def test_tvsum_is_read_from_both_formats(tmp_path):
    label = [[1, 5, 3], [5, 5, 5], [1, 1, 1]]
    record = {"vid": "a", "query": "cars", "domain": "VT", "label": label, "duration": 6, "qid": "a"}
    data = load_tvsum(write_jsonl(tmp_path / "tvsum_train.jsonl", [record, {**record, "vid": "b", "domain": "BK"}]))
    assert np.allclose(data[0]["clip_scores"], [0.5, 1, 0])
    assert data[0]["duration"] == 6
    assert load_tvsum(tmp_path / "tvsum_train.jsonl", domain="BK")["vid"][:] == ["b"]
    (tmp_path / "tvsum_anno.json").write_text(json.dumps({"a": {"anno": label}}))
    assert np.allclose(load_tvsum(tmp_path / "tvsum_anno.json")[0]["clip_scores"], [0.5, 1, 0])
    with pytest.raises(ValueError, match=r"no video of the domain 'XX'; its domains are \['BK', 'VT'\]"):
        load_tvsum(tmp_path / "tvsum_train.jsonl", domain="XX")
    with pytest.raises(ValueError, match="'a' has no labels of the shape"):
        load_tvsum(write_jsonl(tmp_path / "bad.jsonl", [{**record, "label": [[1, 2], [1]]}]))
    folds = leave_one_video_out(data)
    assert [(train["vid"][:], test["vid"][:]) for train, test in folds] == [(["b"], ["a"]), (["a"], ["b"])]


def test_youtube_highlights_are_read_from_both_formats(tmp_path):
    fields = {"domain": "dog", "fps": 25.0, "frames": "200", "clip": [[0, 100], [50, 150]], "match": [-1, 1]}
    (tmp_path / "youtube_anno.json").write_text(json.dumps({"a": fields, "b": {**fields, "domain": "skiing"}}))
    row = load_youtube_highlights(tmp_path / "youtube_anno.json", domain="dog")[0]
    assert row["clip_scores"] == [0, 1]
    assert row["duration"] == 8
    assert row["clip_seconds"] == [[0, 4], [2, 6]]
    released = write_jsonl(tmp_path / "release.jsonl", [{**fields, "vid": "a"}])
    assert load_youtube_highlights(released)[0] == row
    with pytest.raises(ValueError, match="has no 1 of the videos: c"):
        load_youtube_highlights(tmp_path / "youtube_anno.json", videos=["a", "c"])
    with pytest.raises(ValueError, match="'a' has no 'match'"):
        load_youtube_highlights(write_jsonl(tmp_path / "bad.jsonl", [{**fields, "vid": "a", "match": []}]))


def test_features_are_joined_in_the_documented_order():
    slow, clip = np.full((4, 3), 2.0, np.float32), np.eye(5, 2, dtype=np.float32)
    tokens = np.array([[1.0, 0.0], [1.0, 0.0]])
    features = ClipFeatures([{"v": slow}, {"v": clip}], similarity=1, max_clips=3)
    rows = features({"vid": "v"}, tokens)
    assert rows.shape == (3, 3 + 2 + 32 + 2)
    assert np.allclose(rows[:, :3], 2 / (np.sqrt(12) + 1e-5))
    assert np.allclose(rows[:, 3:5], clip[:3], atol=1e-4)
    assert np.allclose(rows[:, 6:37:2], [[4], [0], [0]], atol=1e-3), "4 x cosine in every second channel"
    assert np.allclose(rows[:, 5:37:2].mean(0), 0, atol=1e-5)
    assert np.allclose(rows[:, 5:37:2].std(0), 1, atol=1e-3)
    assert np.allclose(rows[:, 37:], [[0, 1 / 3], [1 / 3, 2 / 3], [2 / 3, 1]])
    plain = ClipFeatures([{"v": slow}], normalize=False, endpoints=False, max_clips=None)
    assert np.array_equal(plain({"vid": "v"}), slow)
    assert np.array_equal(plain({"vid": "v"}, at_most=2), slow[:2])
    assert np.allclose(temporal_endpoints(1), [[0, 1]])
    assert np.isfinite(l2_normalize(np.zeros((2, 3)))).all()


def test_the_similarity_of_equal_clips_is_finite_and_its_errors_name_the_widths():
    assert np.isfinite(query_similarity(np.zeros((3, 2)), np.ones((1, 2)))).all()
    with pytest.raises(ValueError, match="clips are 3 wide, query tokens 2"):
        query_similarity(np.zeros((3, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="channels=3 must be even"):
        query_similarity(np.zeros((3, 2)), np.ones((1, 2)), channels=3)
    with pytest.raises(ValueError, match="needs the query's tokens"):
        ClipFeatures([{"v": np.ones((2, 2))}], similarity=0)({"vid": "v"})
    with pytest.raises(ValueError, match="similarity=1 is not the index of one of 1 kinds"):
        ClipFeatures([{}], similarity=1)
    with pytest.raises(ValueError, match="at least one kind"):
        ClipFeatures([])


def test_rows_of_a_clip_are_averaged():
    rows = np.array([[1.0], [3.0], [10.0], [5.0]], np.float32)
    pooled = PooledFeatures({"v": rows}, {"v": [0, 0, 1, 3]})
    assert pooled["v"].tolist() == [[2], [10], [10], [5]], "clip 2 has no row and repeats clip 1"
    with pytest.raises(ValueError, match="4 feature rows"):
        PooledFeatures({"v": rows}, {"v": [0]})["v"]


def test_named_files_and_arrays_of_published_features(tmp_path):
    np.save(tmp_path / "a_rgb.npy", np.ones((2, 3)))
    np.save(tmp_path / "a_opt.npy", np.zeros((2, 4)))
    np.savez(tmp_path / "qid12.npz", last_hidden_state=np.ones((5, 6)), pooler_output=np.ones(6))
    assert list(FeatureStore(tmp_path, name="{id}_rgb")) == ["a"]
    assert FeatureStore(tmp_path, name="{id}_opt")["a"].shape == (2, 4)
    text = TextFeatures(FeatureStore(tmp_path, name="qid{id}", array="last_hidden_state"), max_tokens=3)
    assert np.allclose(text({"qid": 12}), 1 / np.sqrt(6), atol=1e-4)
    assert text({"qid": 12}).shape == (3, 6)
    with pytest.raises(ValueError, match="name the feature array 'features'"):
        FeatureStore(tmp_path)["qid12"]
    with pytest.raises(FileNotFoundError, match="called '<id>_flow'"):
        FeatureStore(tmp_path, name="{id}_flow")
    with pytest.raises(ValueError, match=r"must contain \{id\} once"):
        FeatureStore(tmp_path, name="rgb")


def test_a_written_archive_is_read(tmp_path):
    features = {"a query": np.ones((2, 3), np.float32), "b": np.zeros((1, 3), np.float32)}
    store = FeatureStore(write_feature_archive(tmp_path / "text.npz", features))
    assert list(store) == list(features)
    assert all(np.array_equal(store[name], rows) for name, rows in features.items())


def test_missing_and_mismatched_features_are_listed_by_id():
    rows = [{"vid": name, "qid": name} for name in "abcde"]
    first = {name: np.ones((9, 3)) for name in "abcd"}
    second = {name: np.ones((length, 2)) for name, length in zip("abcde", (9, 8, 5, 20, 9), strict=True)}
    with pytest.raises(ValueError, match="1 ids have no features: e"):
        ClipFeatures([first, second]).check(rows)
    with pytest.raises(ValueError, match=r"2 videos .* more than 2 clips: c \(9, 5 clips\), d \(9, 20 clips\)"):
        ClipFeatures([first, second]).check(rows[:4])
    assert ClipFeatures([first, second], similarity=1).check(rows[:2]) == 3 + 2 + 32 + 2
    broken = {"a": np.ones((2, 4)), "b": np.ones((2, 3)), "c": np.full((2, 4), np.nan), "d": np.ones((0, 4))}
    with pytest.raises(ValueError) as error:
        TextFeatures(broken).check(rows)
    for part in ("text features by qid", "no features: e", "b (3)", "c (frame 0)", "have no frame: d"):
        assert part in str(error.value)


def test_annotated_pairs_are_the_extremes_and_a_random_pair():
    generator = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = annotated_pairs(ROW, 10, generator)
        assert (positive[0], negative[0]) == (2, 3)
        assert positive[1] in ROW["relevant_clip_ids"]
        assert negative[1] not in ROW["relevant_clip_ids"]
    positive, negative = annotated_pairs({**ROW, "relevant_clip_ids": [0, 1, 2, 3]}, 4, generator)
    assert positive[1] == positive[0]
    assert negative[1] == negative[0]
    late = annotated_pairs({**ROW, "relevant_clip_ids": [12, 3, 4, 6]}, 10, generator)
    assert late[0][0] == 9, "a clip after the features becomes the last"


def test_window_and_ranked_pairs_put_the_better_clip_first():
    generator = np.random.default_rng(0)
    positive, negative = window_pairs({"relevant_windows": [[4, 10]]}, 10, generator)
    assert set(positive) <= {2, 3, 4}
    assert not set(negative) & {2, 3, 4}
    assert window_pairs({"relevant_windows": [[0, 20]]}, 10, generator) == ([0, 0], [0, 0])
    scores = [0.2, 0.9, 0.2, 0.1, 0.5]
    positive, negative = ranked_pairs({"clip_scores": scores}, 5, generator, count=50)
    assert len(positive) == len(negative) == 50
    assert (positive[0], negative[0]) == (1, 3)
    assert all(scores[p] > scores[n] for p, n in zip(positive, negative, strict=True))
    assert ranked_pairs({"clip_scores": [1.0, 1.0]}, 2, generator, count=3) == ([0] * 3, [0] * 3)


def features_for(*lengths):
    generator = np.random.default_rng(0)
    return {f"v{i}": generator.normal(size=(n, 6)).astype(np.float32) for i, n in enumerate(lengths)}


def grounding_rows(*lengths):
    return [{**ROW, "qid": i, "vid": f"v{i}", "clip_scores": [0.5] * n} for i, n in enumerate(lengths)]


def test_moment_detr_batches_train_the_model():
    clips = ClipFeatures([features_for(10, 7)])
    text = TextFeatures({"0": np.ones((3, 4)), "1": np.ones((5, 4))})
    collator = MomentDetrCollator(clips, text, max_windows=1)
    batch = collator(grounding_rows(10, 7))
    assert batch["video_features"].shape == (2, 10, 8)
    assert batch["video_mask"].sum(1).tolist() == [10, 7]
    assert batch["text_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["video_features"][1, 7:].abs().max() == 0
    assert [tuple(spans.shape) for spans in batch["span_labels"]] == [(1, 2), (1, 2)]
    assert batch["saliency_pos_labels"].shape == (2, 2)
    spans = MomentDetrCollator(clips, text)(grounding_rows(10, 7))["span_labels"]
    assert torch.allclose(spans[0], torch.tensor([[0.35, 0.3], [0.65, 0.1]]))
    assert torch.allclose(spans[1], torch.tensor([[0.5, 6 / 14], [13 / 14, 2 / 14]])), "shares of 7 clips, not of 20 s"
    bins = MomentDetrCollator(clips, text, span_loss_type="ce")(grounding_rows(10, 7))["span_labels"]
    assert bins[0].tolist() == [[2, 4], [6, 6]]
    sizes = {"video_feature_dim": 8, "text_feature_dim": 4, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 8}
    MomentDetrForTemporalGrounding(MomentDetrConfig(**sizes))(**batch).loss.backward()
    unlabelled = [{"qid": 0, "vid": "v0", "relevant_windows": None, "clip_scores": None}]
    assert set(collator(unlabelled)) == {"video_features", "video_mask", "text_features", "text_mask"}


def test_draws_repeat_with_a_generator_and_differ_between_workers():
    data = grounding_rows(40, 40)
    text = TextFeatures({"0": np.ones((3, 4)), "1": np.ones((5, 4))})

    def draws(seed):
        collator = MomentDetrCollator(
            ClipFeatures([features_for(40, 40)]), text, generator=np.random.default_rng(seed)
        )
        return [collator(data)["saliency_neg_labels"].tolist() for _ in range(3)]

    assert draws(1) == draws(1) != draws(2)
    collator = MomentDetrCollator(ClipFeatures([features_for(40, 40)]), text)
    loader = torch.utils.data.DataLoader(data * 8, batch_size=2, num_workers=2, collate_fn=collator)
    batches = [batch["saliency_neg_labels"].tolist() for batch in loader]
    assert batches[0::2] != batches[1::2]


def test_umt_batches_train_the_model():
    clips = ClipFeatures([features_for(10, 7)], endpoints=False)
    audio = ClipFeatures([features_for(9, 7)], endpoints=False)
    text = TextFeatures({"0": np.ones((3, 4)), "1": np.ones((5, 4))})
    rows = grounding_rows(10, 6)
    rows[1]["relevant_windows"] = [[4, 10]]
    batch = UMTCollator(clips, audio=audio, text=text)(rows)
    assert batch["video_mask"].sum(1).tolist() == [9, 6], "cut to the audio, and to the labels"
    assert batch["audio_features"].shape == batch["video_features"].shape == (2, 9, 6)
    assert batch["saliency_labels"][1].tolist() == [0.5] * 6 + [-1] * 3
    assert batch["boundary_labels"].tolist() == [[[4, 10], [12, 14]], [[4, 10], [-1, -1]]]
    assert batch["boundary_mask"].tolist() == [[1, 1], [1, 0]]
    config = UMTConfig(
        video_feature_dim=6, audio_feature_dim=6, text_feature_dim=4, d_model=8, max_positions=16,
        heads=["saliency", "boundary"],
    )  # fmt: skip
    UMTForTemporalGrounding(config)(**batch).loss.backward()
    assert set(UMTCollator(clips)([{"vid": "v0"}])) == {"video_features", "video_mask"}
    with pytest.raises(ValueError, match="similarity needs text"):
        UMTCollator(ClipFeatures([features_for(3)], similarity=0))


@pytest.fixture
def encoder_folder(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "runs"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    components = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:3]
    np.savez(tmp_path / "pca.npz", mean=np.full(8, 0.1), components=components)
    return tmp_path


def test_the_mean_token_is_the_sentence_also_after_the_projection(encoder_folder):
    texts = ["a dog runs", "cat", "a a a cat runs"]
    plain = SentenceEncoder(encoder_folder, max_tokens=4)
    sentences = plain.sentences(texts)
    assert np.allclose(np.linalg.norm(sentences, axis=1), 1, atol=1e-5)
    alone = SentenceEncoder(encoder_folder, max_tokens=4).tokens(["cat"])["cat"]
    assert np.allclose(plain.tokens(texts)["cat"], alone, atol=1e-5), "padding changes nothing"
    assert [len(plain.tokens(texts)[text]) for text in texts] == [3, 1, 4]
    projected = SentenceEncoder(encoder_folder, projection=encoder_folder / "pca.npz", max_tokens=4)
    with np.load(encoder_folder / "pca.npz") as file:
        expected = (sentences - file["mean"]) @ file["components"].T
    assert np.allclose(projected.sentences(texts), expected, atol=1e-5)
    np.savez(encoder_folder / "bad.npz", mean=np.zeros(8))
    with pytest.raises(ValueError, match=r"not a projection: it has no \['components'\]"):
        SentenceEncoder(encoder_folder, projection=encoder_folder / "bad.npz")


def test_padding_before_the_text_is_left_out_too(encoder_folder):
    torch.manual_seed(0)
    encoder = SentenceEncoder(encoder_folder)
    encoder.tokenizer.padding_side, encoder.tokenizer.model_input_names = "left", ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder.model = LlamaModel(LlamaConfig(vocab_size=8, **sizes)).eval()
    together = encoder.tokens(["a dog runs", "cat"])
    assert np.allclose(together["cat"], encoder.tokens(["cat"])["cat"], atol=1e-5)
    assert len(together["a dog runs"]) == 3


def test_runs_of_similar_clips_are_moments():
    scene, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    clips = np.stack([scene, scene, other, other, other, scene, other, scene, scene, other])
    assert moments_of_similar_clips(clips, 0, max_gap=0) == [(0, 1), (5, 5), (7, 8)]
    assert moments_of_similar_clips(clips, 0, max_gap=1) == [(0, 1), (5, 8)]
    captions = {"v": [f"caption {i}" for i in range(10)]}
    data = pseudo_queries(captions, {"v": clips}, videos=["v"], per_video=9)
    assert len(data) == 2, "one query a set of moments"
    by_first = {row["relevant_windows"][0][0]: row for row in data}
    assert by_first[0.0]["relevant_windows"] == [[0, 4], [10, 18]]
    assert by_first[0.0]["clip_scores"] == [1, 1, 0, 0, 0, 1, 1, 1, 1, 0]
    assert data[:] == pseudo_queries(captions, {"v": clips}, videos=["v"], per_video=9)[:]
    with pytest.raises(ValueError, match="1 videos have no captions or no features: w"):
        pseudo_queries(captions, {"v": clips}, videos=["v", "w"])
    with pytest.raises(ValueError, match="no pseudo-query could be made"):
        pseudo_queries(captions, {"v": np.ones((10, 2))}, videos=["v"])


def test_the_official_annotations_and_the_caption_features_fit(reference_data):
    data = load_qvhighlights(reference_data("data/qvhighlights/highlight_val_release.jsonl.xz"))
    assert len(data) == 1550
    train, validation = low_resource_split(data)
    assert (len(train), len(validation)) == (700, 150)
    _, more = low_resource_split(data, num_train=100, num_validation=500, pool=700)
    assert set(validation["qid"]) < set(more["qid"])
    assert not {vid.rsplit("_", 2)[0] for vid in train["vid"]} & {vid.rsplit("_", 2)[0] for vid in more["vid"]}
    store = FeatureStore(reference_data("data/features/qvhighlights_val_captions.npz"))
    assert ClipFeatures([store]).check(data) == 130
    perfect = [
        {"qid": row["qid"], "pred_saliency_scores": row["clip_scores"],
         "pred_relevant_windows": [[*window, 1.0] for window in row["relevant_windows"]]}
        for row in validation
    ]  # fmt: skip
    brief = evaluate_qvhighlights(perfect, ground_truth_records(validation))["brief"]
    assert brief["MR-full-R1@0.7"] == 100
    # Moment-DETR's metric takes ten windows; a query may have more.
    assert brief["MR-full-mAP"] > 97


def test_tvsum_and_youtube_highlights_have_their_published_sizes(reference_data):
    tvsum = load_tvsum(reference_data("data/tvsum/tvsum50.jsonl.xz"))
    assert sorted(set(tvsum["domain"])) == list(TVSUM_DOMAINS)
    pooled = pool_frames(FeatureStore(reference_data("data/features/tvsum_captions.npz")), tvsum)
    assert all(len(pooled[row["vid"]]) == len(row["label"]) for row in tvsum)
    published = load_tvsum(reference_data("data/tvsum/tvsum_val.jsonl.xz"))
    assert len(published) == 10
    by_id = {row["vid"]: row["label"] for row in tvsum}
    assert all(row["label"] == by_id[row["vid"]] for row in published)
    best = tvsum_map([np.mean(row["label"], axis=1) for row in tvsum], [row["label"] for row in tvsum])
    assert best > 0.6
    youtube = load_youtube_highlights(reference_data("data/youtube_highlights/youtube_anno.json.xz"))
    assert len(youtube) == 422
    released = reference_data("data/youtube_highlights/youtube_highlight_val_release.jsonl.xz")
    assert len(load_youtube_highlights(released, domain="skiing")) == 50
