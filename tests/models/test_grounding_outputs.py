"""Ragged batches through a Trainer, coordinates under autocast, and how often a step waits for its device."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from peft_read import READConfig
from peft_read.data import ClipFeatures, MomentDetrCollator, TextFeatures, UMTCollator
from peft_read.models import (
    MomentDetrConfig,
    MomentDetrForTemporalGrounding,
    UMTConfig,
    UMTForTemporalGrounding,
    VGBartConfig,
    VGBartForConditionalGeneration,
    grounding_records,
)
from peft_read.models.moment_detr import highlight_scores, ranked_windows
from peft_read.models.moment_detr import loss_moment_detr as losses
from peft_read.models.umt.loss_umt import boundary_targets

LENGTHS = [10, 6, 9, 5, 8, 10, 7]
CLIPS = ClipFeatures(
    [{f"v{i}": np.random.default_rng(i).normal(size=(n, 8)).astype(np.float32) for i, n in enumerate(LENGTHS)}]
)
TEXT = TextFeatures({str(i): np.random.default_rng(i).normal(size=(3, 4)).astype(np.float32) for i in range(7)})
ROWS = [
    {"qid": i, "vid": f"v{i}", "relevant_windows": [[0, 4], [6, 8]][: 1 + i % 2], "relevant_clip_ids": [0, 1],
     "saliency_scores": [[4, 4, 4], [1, 1, 1]], "clip_scores": [0.5] * n}
    for i, n in enumerate(LENGTHS)
]  # fmt: skip
SIZES = {"video_feature_dim": 10, "text_feature_dim": 4, "d_model": 16, "num_attention_heads": 2}


def moment_detr(**options):
    return MomentDetrForTemporalGrounding(MomentDetrConfig(**SIZES, ffn_dim=16, **options))


def umt(**options):
    heads = ["saliency", "boundary"]
    config = UMTConfig(**SIZES, audio_feature_dim=None, heads=heads, **{"max_positions": 16, **options})
    return UMTForTemporalGrounding(config)


def predicted(model, collator, folder, rows=ROWS):
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=3, remove_unused_columns=False, use_cpu=True, report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=collator).predict(rows)


def test_moment_detr_keeps_every_label_and_marks_padded_clips(tmp_path):
    result = predicted(moment_detr(), MomentDetrCollator(CLIPS, TEXT), tmp_path)
    spans = result.label_ids[0]
    assert spans.shape == (7, 2, 2)
    assert [(row[:, 0] >= 0).sum() for row in spans] == [1 + i % 2 for i in range(7)]
    assert np.isfinite(result.metrics["test_loss"])
    *_, saliency, mask = result.predictions
    assert saliency.shape == mask.shape == (7, 10)
    assert (mask > 0).sum(1).tolist() == LENGTHS
    scores = highlight_scores(torch.from_numpy(saliency), torch.from_numpy(mask))
    assert [len(row) for row in scores] == LENGTHS


def test_umt_keeps_every_label_and_marks_padded_clips(tmp_path):
    result = predicted(umt(), UMTCollator(CLIPS, text=TEXT), tmp_path)
    _, boundaries, mask = result.predictions
    assert (mask > 0).sum(1).tolist() == LENGTHS
    assert (boundaries[..., 2] > 0).sum(1).tolist() == LENGTHS
    labels, windows = result.label_ids
    assert [(row >= 0).sum() for row in labels] == LENGTHS
    assert [(row[:, 0] >= 0).sum() for row in windows] == [1 + i % 2 for i in range(7)]


@pytest.mark.parametrize("build", [moment_detr, umt])
def test_predictions_never_begin_with_the_loss(build, tmp_path):
    """Where a batch lacks one kind of label, a Trainer takes what the model returns as it is."""
    collate = MomentDetrCollator(CLIPS, TEXT, pairs=None) if build is moment_detr else UMTCollator(CLIPS, text=TEXT)
    column = "relevant_windows" if build is moment_detr else "clip_scores"
    rows = [{"vid": row["vid"], "qid": row["qid"], column: row[column]} for row in ROWS]
    model = build()
    predictions = predicted(model, collate, tmp_path, rows).predictions
    records = grounding_records(predictions, [{**row, "query": "a", "duration": 20} for row in ROWS], model.config)
    assert [len(record["pred_saliency_scores"]) for record in records] == LENGTHS


@pytest.mark.parametrize("build", [moment_detr, umt])
def test_reentrant_checkpointing_trains_the_adapters_of_every_layer(build):
    """Features need no gradient, and that kind of checkpointing computes none behind such inputs."""
    torch.manual_seed(0)
    base = build(dropout=0.0, input_dropout=0.0, **({"text_dropout": 0.0} if build is umt else {}))
    model = get_peft_model(base.train(), READConfig(r=2))
    for name, parameter in model.named_parameters():
        if "readapter_up" in name:
            torch.nn.init.normal_(parameter)
    collate = MomentDetrCollator(CLIPS, TEXT) if build is moment_detr else UMTCollator(CLIPS, text=TEXT)
    batch, gradients = collate(ROWS), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.any() or "bias_hh" in name, name


@pytest.mark.parametrize("build", [moment_detr, umt])
def test_float64_models_stay_in_float64(build):
    collate = MomentDetrCollator(CLIPS, TEXT) if build is moment_detr else UMTCollator(CLIPS, text=TEXT)
    batch = collate(ROWS)
    model = build().eval()
    single = model(**batch)
    double = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    output = model.double()(**double)
    assert output.saliency_scores.dtype == torch.float64
    torch.testing.assert_close(output.saliency_scores.float(), single.saliency_scores, rtol=1e-4, atol=1e-5)
    assert output.loss.item() == pytest.approx(single.loss.item(), rel=1e-4)


def test_padded_moments_with_and_without_their_mask_equal_lists():
    model = moment_detr().eval()
    batch = MomentDetrCollator(CLIPS, TEXT)(ROWS)
    expected = model(**batch)
    for change in (
        {"span_mask": None},
        {"span_mask": batch["span_mask"].bool()},
        {"span_labels": [s[m > 0] for s, m in zip(batch["span_labels"], batch["span_mask"], strict=True)],
         "span_mask": None},
    ):  # fmt: skip
        output = model(**{**batch, **change})
        for name, value in expected.loss_dict.items():
            torch.testing.assert_close(output.loss_dict[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"span_mask must be \(7, 2\), not \(7, 1\)"):
        model(**{**batch, "span_mask": torch.ones(7, 1)})


def test_no_pair_adds_nothing_and_labels_are_checked():
    scores = torch.tensor([[0.5, 0.4, 0.0]])
    config = MomentDetrConfig()

    def loss(positive, negative):
        return losses._saliency_loss(scores, torch.tensor(positive), torch.tensor(negative), config)

    assert loss([[0, -1]], [[1, -1]]).item() == pytest.approx((0.2 + 0.4 - 0.5) / 2 * 2)
    with pytest.raises(ValueError, match="names clip 3 of 3 clips"):
        loss([[3]], [[0]])
    with pytest.raises(ValueError, match=r"must both be \(1, pairs\), not \(1, 1\) and \(1, 2\)"):
        loss([[0]], [[0, 1]])
    model, batch = moment_detr(), MomentDetrCollator(CLIPS, TEXT)(ROWS[:1])
    for spans, message in [
        ([[[10.0, 20.0]]], "fractions of the video"),
        ([[[0.5, float("nan")]]], "fractions of the video"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, "span_labels": torch.tensor(spans), "span_mask": torch.ones(1, 1)})
    with torch.no_grad():
        model.span_embed.layers[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="example 0 of the batch are not finite: it diverged"):
        model(**batch)


@pytest.mark.parametrize("build", [moment_detr, umt])
def test_additive_masks_are_refused(build):
    model, video = build(), torch.randn(1, 4, 10)
    inputs = {"video_features": video, "text_features": torch.randn(1, 3, 4)}
    additive = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match="video_mask holds negative numbers or NaN"):
        model(**inputs, video_mask=additive)
    with pytest.raises(ValueError, match="text_mask holds negative numbers or NaN"):
        model(**inputs, text_mask=additive[:, 1:])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_moments_are_computed_in_float32_under_autocast_and_with_half_weights(weights):
    model = moment_detr().eval().to(weights)
    states = {}
    model.transformer.decoder.register_forward_hook(lambda m, a, output: states.update(decoded=output[-1]))
    inputs = {"video_features": torch.randn(2, 75, 10), "text_features": torch.randn(2, 3, 4)}
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32), torch.no_grad():
        output = model(**inputs)
    exact = states["decoded"].double()
    for i, layer in enumerate(model.span_embed.layers):
        exact = exact @ layer.weight.double().T + layer.bias.double()
        exact = exact.relu() if i < 2 else exact.sigmoid()
    assert output.pred_spans.dtype == output.pred_logits.dtype == output.saliency_scores.dtype == torch.float32
    torch.testing.assert_close(output.pred_spans.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_windows_of_umt_are_computed_in_float32(weights):
    model = umt(max_positions=400).eval()
    with torch.no_grad():
        model.pred_head[1].window_pred.linear.bias.fill_(100.3)
        model.pred_head[1].offset_pred.linear.bias.fill_(0.3)
    model = model.to(weights)
    states = {}
    model.query_dec.register_forward_hook(lambda m, a, output: states.update(decoded=output[-1]))
    inputs = {"video_features": torch.randn(1, 400, 10), "text_features": torch.randn(1, 3, 4)}
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32), torch.no_grad():
        output = model(**inputs)
    center, window, offset = (
        (states["decoded"].double() @ head.linear.weight.double().T + head.linear.bias.double()).squeeze(-1)
        for head in (getattr(model.pred_head[1], f"{name}_pred") for name in ("center", "window", "offset"))
    )
    scores, best = center.sigmoid().topk(100)
    middle, half = best + offset.gather(1, best).clamp(min=0), window.gather(1, best).clamp(min=0) / 2
    bounds = torch.stack((middle - half, middle + half), -1).clamp(0, 399) * 2 + torch.tensor([0.0, 2.0])
    assert output.boundaries.dtype == torch.float32
    torch.testing.assert_close(output.boundaries[..., 2].double(), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.boundaries[..., :2].double(), bounds, rtol=0, atol=1e-3)


def test_losses_are_computed_in_float32_under_autocast():
    config = MomentDetrConfig(contrastive_align=True)
    queries, words = torch.randn(2, 10, 64), torch.randn(2, 5, 64)
    layer = {"pred_logits": torch.randn(2, 10, 2), "pred_spans": torch.rand(2, 10, 2) / 2,
             "proj_queries": queries, "proj_txt_mem": words}  # fmt: skip
    labels = {"span_labels": torch.full((2, 1, 2), 0.3), "saliency_scores": torch.randn(2, 4),
              "saliency_pos_labels": torch.tensor([[0], [1]]), "saliency_neg_labels": torch.tensor([[1], [2]]),
              "text_mask": torch.ones(2, 5)}  # fmt: skip
    expected = losses.moment_detr_losses([layer], config=config, **labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses.moment_detr_losses([layer], config=config, **labels)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


class Waits(TorchDispatchMode):
    """Counts the operations after which a program must wait for its device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.NAMES):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The checks of values that run on the CPU only are left out, as they are on a device."""
    for name in ("peft_read.models.float32_heads", "peft_read.models.moment_detr.loss_moment_detr",
                 "peft_read.models.umt.loss_umt"):  # fmt: skip
        monkeypatch.setattr(f"{name}.values_can_be_checked", lambda tensor: False)
    monkeypatch.setattr("peft_read.spans._check_spans", lambda *spans, **options: None)


def test_matching_copies_the_costs_of_all_layers_to_the_host_once(as_on_a_device, monkeypatch):
    transfers = []
    split = np.split
    monkeypatch.setattr(losses.np, "split", lambda packed, *a, **k: transfers.append(packed) or split(packed, *a, **k))
    for options in ({}, {"decoder_layers": 3, "contrastive_align": True}, {"span_loss_type": "ce"}):
        model = moment_detr(**options)
        kind = options.get("span_loss_type", "l1")
        batch = MomentDetrCollator(CLIPS, TEXT, span_loss_type=kind)(ROWS)
        transfers.clear()
        with Waits() as waits:
            model(**batch).loss.backward()
        assert waits.seen == []
        assert len(transfers) == 1


def test_umt_never_synchronises(as_on_a_device):
    model, batch = umt(decoder_layers=2, loss_layers=[0, 1]), UMTCollator(CLIPS, text=TEXT)(ROWS)
    with Waits() as waits:
        model(**batch).loss.backward()
    assert waits.seen == []


def test_windows_of_long_videos_are_not_cut_at_150_seconds():
    config, logits = MomentDetrConfig(), torch.zeros(1, 1, 2)
    span = torch.tensor([[[410 / 600, 20 / 600]]])
    assert ranked_windows(logits, span, [600.0], config=config) == [[[400, 420, 0.5]]]
    with pytest.raises(ValueError, match="longest_seconds=150 would cut the windows of a video of 600 s"):
        ranked_windows(logits, span, [600.0], config=config, longest_seconds=150)
    classified = MomentDetrConfig(span_loss_type="ce", num_span_bins=100)
    bins = torch.full((1, 1, 200), -9.0)
    bins[0, 0, 90], bins[0, 0, 195] = 9, 9
    assert ranked_windows(logits, bins, [150.0], config=classified) == [[]], "it begins after the video"
    bins[0, 0, 90], bins[0, 0, 50] = -9, 9  # first clip 50, last clip 95: cut at 150 s
    assert ranked_windows(logits, bins, [150.0], config=classified)[0][0][:2] == [100, 150]
    bins[0, 0, 195], bins[0, 0, 120] = 0, 9  # the likeliest last clip, 20, lies before the likeliest first one
    assert ranked_windows(logits, bins, [150.0], config=classified)[0][0][:2] == [100, 150]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            ranked_windows(logits + bad, span, [600.0], config=config)
        with pytest.raises(ValueError, match="highlight scores of video 0"):
            highlight_scores(torch.full((1, 2), bad), torch.ones(1, 2))
    with pytest.raises(ValueError, match="the duration of video 0"):
        ranked_windows(logits, span, [-1], config=config)


def test_a_window_after_the_last_clip_is_not_a_target():
    targets = boundary_targets(torch.tensor([[[400.0, 420.0], [4.0, 6.0]]]), torch.ones(1, 2), 75, UMTConfig())
    assert targets.weight.nonzero().tolist() == [[0, 2]]
    assert int(targets.windows) == 1
    with pytest.raises(ValueError, match="ends before it starts"):
        boundary_targets(torch.tensor([[[6.0, 4.0]]]), None, 75, UMTConfig())
    model, batch = umt(), UMTCollator(CLIPS, text=TEXT)(ROWS[:1])
    for value in (float("nan"), 7.0):
        with pytest.raises(ValueError, match="saliency_labels holds NaN or more than 1"):
            model(**{**batch, "saliency_labels": torch.full((1, 10), value)})


def test_texts_over_the_position_table_are_named():
    config = VGBartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, visual_feature_dim=6, max_position_embeddings=32,
    )  # fmt: skip
    model, video = VGBartForConditionalGeneration(config), torch.randn(1, 5, 6)
    for source, target, name in ((40, 2, "transcript"), (2, 40, "summary")):
        tokens = [torch.ones(1, length, dtype=torch.long) for length in (source, target)]
        with pytest.raises(ValueError, match=f"a {name} of 40 tokens, but the position table has 32 rows"):
            model(tokens[0], video_features=video, decoder_input_ids=tokens[1])


def test_a_submission_takes_the_best_windows_of_all_layers(monkeypatch):
    model = umt(decoder_layers=2, pred_layers=[0, -1]).eval()
    worse_then_better = iter((0.1, 0.8))  # centre probabilities of the first and of the last layer

    def predict(states, mask):
        shape = states.shape[:2]
        return next(worse_then_better) * mask, torch.ones(shape), torch.zeros(shape)

    monkeypatch.setattr(model.pred_head[1], "forward", predict)
    output = model(**UMTCollator(CLIPS, text=TEXT)(ROWS[:1]))
    outputs = [part.detach().numpy() for part in (output.saliency_scores, output.boundaries, output.video_mask)]
    (record,) = grounding_records(outputs, [{"query": "q", "vid": "v0", "duration": 1000.0}], model.config)
    assert [score for *_, score in record["pred_relevant_windows"]] == [0.8] * 10
    assert record["pred_saliency_scores"] == output.saliency_scores[0].tolist()  # not in float16, as Moment-DETR's are
