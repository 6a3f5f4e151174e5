"""Moment-DETR: parity with the original, every option against plain formulas, losses, windows, checkpoints."""

import argparse
import math

import pytest
import torch
from golden_cases import golden_case, record_outputs
from transformers import AutoConfig, AutoModel

from peft_read.models import MomentDetrConfig, MomentDetrForTemporalGrounding
from peft_read.models.moment_detr import highlight_scores, ranked_windows
from peft_read.models.moment_detr.loss_moment_detr import match_queries, moment_detr_losses, weighted_sum

SMALL = {
    "video_feature_dim": 6,
    "text_feature_dim": 5,
    "d_model": 16,
    "num_attention_heads": 4,
    "ffn_dim": 12,
    "num_queries": 4,
}
OPTIONS = {
    "default": {},
    "pre-norm, three projections": {"pre_norm": True, "num_input_projections": 3, "auxiliary_loss": False},
    "one projection": {"num_input_projections": 1},
    "contrastive, text positions": {
        "contrastive_align": True,
        "contrastive_dim": 7,
        "contrastive_loss_weight": 0.02,
        "use_text_positions": True,
    },
    "clip indices": {"span_loss_type": "ce", "num_span_bins": 9},
    "everything": {
        "pre_norm": True,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "contrastive_align": True,
        "use_text_positions": True,
        "span_loss_type": "ce",
        "num_span_bins": 9,
    },
}


def small_model(**options):
    model = MomentDetrForTemporalGrounding(MomentDetrConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch():
    video_mask = torch.arange(9) < torch.tensor([9, 6, 1])[:, None]
    text_mask = torch.arange(4) < torch.tensor([2, 4, 1])[:, None]
    return {
        "video_features": torch.randn(3, 9, 6) * video_mask[..., None],
        "video_mask": video_mask.float(),
        "text_features": torch.randn(3, 4, 5) * text_mask[..., None],
        "text_mask": text_mask.float(),
    }


def labels(model):
    if model.config.span_loss_type == "ce":
        spans = [torch.tensor([[1, 4], [6, 8]]), torch.tensor([[0, 5]]), torch.tensor([[0, 0]])]
    else:
        spans = [torch.tensor([[0.3, 0.2], [0.8, 0.4]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, 0.1]])]
    pairs = torch.tensor([[3, 7], [2, 5], [0, 0]])
    return {"span_labels": spans, "saliency_pos_labels": pairs, "saliency_neg_labels": pairs.flip(1)}


def test_everything_equals_the_original(reference_data):
    golden, notes = golden_case(reference_data("golden/moment_detr/default.safetensors"))
    config = MomentDetrConfig.from_original_options(notes["config"])
    model = MomentDetrForTemporalGrounding.from_original_checkpoint(golden["state_dict"], config)
    inputs, close = golden["inputs"], {"rtol": 1e-4, "atol": 1e-4}
    seen = record_outputs(model)
    transformer = {}
    model.transformer.register_forward_hook(lambda module, args, output: transformer.update(enumerate(output)))
    output = model(
        video_features=inputs["src_vid"],
        video_mask=inputs["src_vid_mask"],
        text_features=inputs["src_txt"],
        text_mask=inputs["src_txt_mask"],
        span_labels=[inputs[f"span_labels.{i}"] for i in range(3)],
        saliency_pos_labels=inputs["saliency_pos_labels"],
        saliency_neg_labels=inputs["saliency_neg_labels"],
    )
    for name in ("pred_logits", "pred_spans", "saliency_scores"):
        torch.testing.assert_close(output[name], golden["outputs"][name], **close)
    for name, value in output.auxiliary_outputs[0].items():
        torch.testing.assert_close(value, golden["outputs"][f"aux_outputs.0.{name}"], **close)
    assert {*output.loss_dict, "loss_overall"} == set(golden["losses"])
    for name, expected in golden["losses"].items():
        actual = output.loss if name == "loss_overall" else output.loss_dict[name]
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    matches = match_queries(
        output.pred_logits, output.pred_spans, [inputs[f"span_labels.{i}"] for i in range(3)], config
    )
    for i, (queries, chosen) in enumerate(matches):
        assert queries.equal(golden["match"][f"{i}.pred"])
        assert chosen.equal(golden["match"][f"{i}.tgt"])
    for name, expected in golden["hidden"].items():
        if name.startswith("transformer."):
            actual = transformer[int(name[-1])]
        else:
            path = name.replace("ffn_out", "linear2")
            actual = seen[path if path in seen else f"transformer.{path}"]
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    for i, state in enumerate(output.encoder_hidden_states[1:]):
        torch.testing.assert_close(state, golden["hidden"][f"encoder.layers.{i}"], **close)
    projected = torch.cat([golden["hidden"]["input_vid_proj"], golden["hidden"]["input_txt_proj"]], dim=1)
    torch.testing.assert_close(output.encoder_hidden_states[0], projected, **close)


def attention_by_hand(module, query, key, value):
    """Multi-head attention of one unpadded example (L, d), head by head."""
    (wq, wk, wv), (bq, bk, bv) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    size = q.shape[1] // module.num_heads
    heads = [slice(size * h, size * (h + 1)) for h in range(module.num_heads)]
    mixed = [(q[:, h] @ k[:, h].T / math.sqrt(size)).softmax(-1) @ v[:, h] for h in heads]
    return module.out_proj(torch.cat(mixed, dim=1))


def forward_by_hand(model, video, text):
    """Memory and normalised decoder states of one unpadded example, from the formulas alone."""
    config, encoder, decoder = model.config, model.transformer.encoder, model.transformer.decoder

    def project(features, blocks):
        for i, block in enumerate(blocks):
            features = block.net[1](block.LayerNorm(features))
            features = features.relu() if i < len(blocks) - 1 else features
        return features

    def feed_forward(layer, x):
        return layer.linear2(layer.linear1(x).relu())

    video, text = project(video, model.input_vid_proj), project(text, model.input_txt_proj)
    d, clips = config.d_model, len(video)
    code = torch.zeros(clips + len(text), d)
    for t in range(clips):
        for j in range(d):
            angle = 2 * math.pi * (t + 1) / (clips + 1e-6) / 10000 ** (2 * (j // 2) / d)
            code[t, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    if config.use_text_positions:
        table = model.txt_position_embed
        code[clips:] = table.LayerNorm(text + table.position_embeddings.weight[: len(text)])
    x = torch.cat([video, text])
    for layer in encoder.layers:
        if config.pre_norm:
            y = layer.norm1(x)
            x = x + attention_by_hand(layer.self_attn, y + code, y + code, y)
            x = x + feed_forward(layer, layer.norm2(x))
        else:
            x = layer.norm1(x + attention_by_hand(layer.self_attn, x + code, x + code, x))
            x = layer.norm2(x + feed_forward(layer, x))
    memory = encoder.norm(x) if config.pre_norm else x
    where, x, states = model.query_embed.weight, torch.zeros(config.num_queries, d), []
    for layer in decoder.layers:
        if config.pre_norm:
            y = layer.norm1(x)
            x = x + attention_by_hand(layer.self_attn, y + where, y + where, y)
            x = x + attention_by_hand(layer.multihead_attn, layer.norm2(x) + where, memory + code, memory)
            x = x + feed_forward(layer, layer.norm3(x))
        else:
            x = layer.norm1(x + attention_by_hand(layer.self_attn, x + where, x + where, x))
            x = layer.norm2(x + attention_by_hand(layer.multihead_attn, x + where, memory + code, memory))
            x = layer.norm3(x + feed_forward(layer, x))
        states.append(decoder.norm(x))
    return memory, torch.stack(states)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_follows_its_formula_for_any_padding(options):
    model, inputs = small_model(**options), batch()
    output = model(**inputs)
    for i, (clips, words) in enumerate([(9, 2), (6, 4), (1, 1)]):
        memory, states = forward_by_hand(
            model, inputs["video_features"][i, :clips], inputs["text_features"][i, :words]
        )
        spans = model.span_embed.layers[0](states[-1]).relu()
        spans = model.span_embed.layers[2](model.span_embed.layers[1](spans).relu())
        spans = spans if model.config.span_loss_type == "ce" else spans.sigmoid()
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(output.pred_spans[i], spans, **close)
        torch.testing.assert_close(output.pred_logits[i], model.class_embed(states[-1]), **close)
        saliency = model.saliency_proj(memory[:clips]).squeeze(-1)
        torch.testing.assert_close(output.saliency_scores[i, :clips], saliency, **close)
        if model.config.auxiliary_loss:
            assert len(output.auxiliary_outputs) == model.config.decoder_layers - 1
            first = output.auxiliary_outputs[0]["pred_logits"][i]
            torch.testing.assert_close(first, model.class_embed(states[0]), **close)
        else:
            assert output.auxiliary_outputs is None
        if model.config.contrastive_align:
            queries = model.contrastive_align_projection_query(states[-1])
            torch.testing.assert_close(output.proj_queries[i], queries / queries.norm(dim=-1)[:, None], **close)
            video = model.contrastive_align_projection_vid(memory[:clips])
            torch.testing.assert_close(
                output.proj_vid_mem[i, :clips], video / video.norm(dim=-1, keepdim=True), **close
            )
    assert len(output.encoder_hidden_states) == model.config.encoder_layers + 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_complete_and_train(options):
    model, inputs = small_model(**options), batch()
    output = model(**inputs, **labels(model))
    suffixes = [""] + [f"_{i}" for i in range(model.config.decoder_layers - 1) if model.config.auxiliary_loss]
    terms = ["loss_span", "loss_giou", "loss_label", "class_error"]
    terms += ["loss_contrastive_align"] if model.config.contrastive_align else []
    assert set(output.loss_dict) == {"loss_saliency"} | {term + suffix for term in terms for suffix in suffixes}
    weights = {"loss_span": 10, "loss_giou": 1, "loss_label": 4, "loss_saliency": 1, "class_error": 0}
    weights["loss_contrastive_align"] = model.config.contrastive_loss_weight
    total = sum(value * weights[name.rstrip("_0123456789")] for name, value in output.loss_dict.items())
    torch.testing.assert_close(output.loss, total)
    output.loss.backward()
    unused = {"contrastive_align_projection_vid", "txt_position_embed", "contrastive_align_projection_query"}
    unused |= {"contrastive_align_projection_txt"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or name.split(".")[0] in unused, name
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_losses_by_hand():
    config = MomentDetrConfig(contrastive_align=True, background_weight=0.1, contrastive_temperature=0.5)
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    spans = torch.tensor([[[0.5, 0.2], [0.1, 0.2], [0.9, 0.2]]])
    queries = torch.eye(3).unsqueeze(0)
    text = torch.tensor([[[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]]])
    layer = {"pred_logits": logits, "pred_spans": spans, "proj_queries": queries, "proj_txt_mem": text}
    losses = moment_detr_losses(
        [layer],
        config=config,
        span_labels=[torch.tensor([[0.5, 0.4], [0.1, 0.2]])],
        saliency_scores=torch.tensor([[0.5, 0.4, -1.0]]),
        saliency_pos_labels=torch.tensor([[0, 0]]),
        saliency_neg_labels=torch.tensor([[1, 2]]),
        text_mask=torch.tensor([[True, False]]),
    )
    # matched: query 0 with [0.3, 0.7] (its own span is [0.4, 0.6]: half of it), query 1 exactly
    entropy = [-torch.log_softmax(row, 0) for row in logits[0]]
    similarity = torch.tensor([0.6, 1.8, 0.0]) / 0.5
    expected = {
        "loss_span": torch.tensor(0.2 / 4),
        "loss_giou": torch.tensor((0.5 + 0.0) / 2),
        "loss_label": (entropy[0][0] + entropy[1][0] + 0.1 * entropy[2][1]) / 3,
        "class_error": torch.tensor(50.0),
        "loss_contrastive_align": similarity.logsumexp(0) - (similarity[0] + similarity[1]) / 2,
        "loss_saliency": torch.tensor((0.2 + 0.4 - 0.5) / 2 * 2),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=lambda text, name=name: f"{name}: {text}")
    config.mask_contrastive_text = True
    similarity = torch.tensor([0.6, 0.8, 0.0]) / 0.5
    masked = moment_detr_losses(
        [layer],
        config=config,
        span_labels=[torch.tensor([[0.5, 0.4], [0.1, 0.2]])],
        saliency_scores=torch.zeros(1, 3),
        saliency_pos_labels=None,
        saliency_neg_labels=None,
        text_mask=torch.tensor([[True, False]]),
    )
    assert masked["loss_saliency"] == 0
    value = similarity.logsumexp(0) - (similarity[0] + similarity[1]) / 2
    torch.testing.assert_close(masked["loss_contrastive_align"], value)


def test_clip_index_losses_by_hand():
    config = MomentDetrConfig(span_loss_type="ce", num_span_bins=3)
    logits = torch.zeros(1, 2, 2)
    spans = torch.tensor([[[0.0, 0, 0, 0, 0, 0], [0.0, 2, 0, 0, 0, 3]]])
    target = [torch.tensor([[1, 2]])]
    ((queries, chosen),) = match_queries(logits, spans, target, config)
    assert (queries.tolist(), chosen.tolist()) == ([1], [0])
    losses = moment_detr_losses(
        [{"pred_logits": logits, "pred_spans": spans}],
        config=config,
        span_labels=target,
        saliency_scores=torch.zeros(1, 3),
        saliency_pos_labels=None,
        saliency_neg_labels=None,
        text_mask=torch.ones(1, 1),
    )
    first, last = math.log(2 + math.exp(2)) - 2, math.log(2 + math.exp(3)) - 3
    assert losses["loss_span"].item() == pytest.approx((first + last) / 2, abs=1e-6)
    assert losses["loss_giou"] == 0
    assert weighted_sum(losses, config).item() == pytest.approx(
        10 * losses["loss_span"].item() + 4 * (1 + 0.1) / 2 * math.log(2), abs=1e-5
    )


def test_examples_without_moments_and_highlights_alone():
    model, inputs = small_model(), batch()
    targets = labels(model)
    targets["span_labels"][1] = torch.zeros(0, 2)
    assert model(**inputs, **targets).loss.isfinite()
    targets["span_labels"] = [torch.zeros(0, 2)] * 3
    output = model(**inputs, **targets)
    assert output.loss_dict["loss_span"] == 0
    output.loss.backward()
    only_highlights = {name: value for name, value in targets.items() if name != "span_labels"}
    output = model(**inputs, **only_highlights)
    assert set(output.loss_dict) == {"loss_saliency"}
    torch.testing.assert_close(output.loss, output.loss_dict["loss_saliency"])
    unlabelled = model(**inputs)
    assert unlabelled.loss is None
    assert unlabelled.loss_dict is None


def test_the_encoder_gets_mask_and_segments_by_name():
    model, inputs = small_model(), batch()
    heard = {}
    model.transformer.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: heard.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    mask = torch.cat([inputs["video_mask"], inputs["text_mask"]], dim=1)
    assert heard["attention_mask"].equal(mask.bool())
    assert heard["segment_ids"].tolist() == [[0] * 9 + [1] * 4] * 3


def test_videos_of_any_length():
    model = small_model()
    for clips in (1, 150, 2000):
        output = model(torch.randn(1, clips, 6), text_features=torch.randn(1, 3, 5))
        assert output.saliency_scores.shape == (1, clips)
        assert output.pred_spans.isfinite().all()


def test_masks_of_any_type_and_rows_without_tokens():
    model, inputs = small_model(), batch()
    expected = model(**inputs)
    for dtype in (torch.bool, torch.int64):
        other = {name: value.to(dtype) if name.endswith("mask") else value for name, value in inputs.items()}
        torch.testing.assert_close(model(**other).pred_spans, expected.pred_spans)
    inputs["video_mask"][1], inputs["text_mask"][1] = 0, 0
    output = model(**inputs)
    assert output.pred_spans.isfinite().all()
    torch.testing.assert_close(output.pred_spans[0], expected.pred_spans[0])


def test_save_and_load_and_initialisation(tmp_path):
    model, inputs = small_model(contrastive_align=True, pre_norm=True), batch()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MomentDetrConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MomentDetrForTemporalGrounding)
    torch.testing.assert_close(loaded(**inputs).proj_queries, model(**inputs).proj_queries)
    fresh = MomentDetrForTemporalGrounding(MomentDetrConfig())
    assert sum(parameter.numel() for parameter in fresh.parameters()) == 4_823_305
    xavier = math.sqrt(6 / (256 + 1024))
    assert 0.99 * xavier < fresh.transformer.encoder.layers[0].linear1.weight.abs().max() <= xavier
    for module in (fresh.transformer.encoder.layers[0], fresh.transformer.decoder.layers[1]):
        assert not module.self_attn.out_proj.bias.any()
        assert module.self_attn.out_proj.weight.abs().max() > 0.99 * math.sqrt(6 / 512)
        assert module.self_attn.in_proj_weight.abs().max() > 0.99 * math.sqrt(6 / 1024)
    assert 0.9 < fresh.query_embed.weight.std() < 1.1
    assert fresh.class_embed.weight.abs().max() <= 1 / 16


def test_original_checkpoints_with_their_options_inside(tmp_path):
    model, inputs = small_model(), batch()
    path = tmp_path / "model_best.ckpt"
    options = argparse.Namespace(hidden_dim=16, device=torch.device("cpu"))
    torch.save({"model": model.state_dict(), "optimizer": {}, "epoch": 7, "opt": options}, path)
    loaded = MomentDetrForTemporalGrounding.from_original_checkpoint(path, model.config)
    torch.testing.assert_close(loaded(**inputs).pred_spans, model(**inputs).pred_spans)
    # The original writes opt.json before it adds the channels of the endpoints to the width, a checkpoint after it.
    written = {"ctx_mode": "video_tef", "v_feat_dim": 2816}
    assert MomentDetrConfig.from_original_options(written).video_feature_dim == 2818
    assert MomentDetrConfig.from_original_options({**written, "ctx_mode": "video"}).video_feature_dim == 2816
    added = {**written, "use_tef": True, "v_feat_dim": 2818}
    assert MomentDetrConfig.from_original_options(added).video_feature_dim == 2818
    bad = {**model.state_dict(), "class_embed.weight": torch.zeros(3, 16), "stranger": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 left over \['stranger'\], 1 of another shape \['class_embed.weight'\]"):
        MomentDetrForTemporalGrounding.from_original_checkpoint(bad, model.config)
    torch.save({"model": model.state_dict(), "hook": print}, path)
    with pytest.raises(ValueError, match="reading arbitrary objects can run code"):
        MomentDetrForTemporalGrounding.from_original_checkpoint(path, model.config)


def test_checkpointed_gradients_are_the_same():
    gradients = []
    model, inputs = small_model(dropout=0.0, input_dropout=0.0), batch()
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, **labels(model)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_ranked_windows_by_hand():
    config = MomentDetrConfig()
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    spans = torch.tensor([[[0.5, 0.2], [0.04, 0.2], [0.5, 0.22]]])
    (windows,) = ranked_windows(logits, spans, [30.0], config=config)
    # [-1.8, 4.2] is clamped; [11.7, 18.3] and [12, 18] go to whole clips, 5.85 and 9.15 clips are 6 and 9
    assert windows == [[0.0, 4.0, 0.8808], [12.0, 18.0, 0.7311], [12.0, 18.0, 0.5]]
    (kept,) = ranked_windows(logits, spans, [30.0], config=config, nms_threshold=0.7)
    assert kept == windows[:2]
    (exact,) = ranked_windows(logits, spans, [30.0], config=config, clip_seconds=None)
    assert exact[1][:2] == pytest.approx([11.7, 18.3])
    (half,) = ranked_windows(logits[:, :1], torch.tensor([[[8 / 32, 6 / 32]]]), [32.0], config=config)
    assert half == [[4.0, 12.0, 0.5]]  # 5 and 11 seconds are 2.5 and 5.5 clips: half to even


def test_ranked_windows_of_clip_indices():
    config = MomentDetrConfig(span_loss_type="ce", num_span_bins=4)
    spans = torch.tensor([[[0.0, 9, 0, 0, 0, 0, 9, 0]]])
    (windows,) = ranked_windows(torch.zeros(1, 1, 2), spans, [8.0], config=config)
    probability = (math.exp(9) / (math.exp(9) + 3)) ** 2
    assert windows == [[2.0, 6.0, pytest.approx(probability, abs=5e-5)]]
    with pytest.raises(ValueError, match="pass clip_seconds"):
        ranked_windows(torch.zeros(1, 1, 2), spans, [8.0], config=config, clip_seconds=None)
    with pytest.raises(ValueError, match="2 durations for 1 videos"):
        ranked_windows(torch.zeros(1, 1, 2), spans, [8.0, 8.0], config=config)


def test_highlight_scores_are_cut_and_rounded():
    scores, mask = torch.tensor([[0.1, 0.2, 0.3], [1 / 3, 9.0, 9.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert highlight_scores(scores, mask)[1] == [torch.tensor(1 / 3).half().item()]
    assert highlight_scores(scores, mask, half_precision=False)[0] == pytest.approx([0.1, 0.2, 0.3])


def test_failures():
    model, inputs = small_model(), batch()
    with pytest.raises(ValueError, match="grounds a text query"):
        model(inputs["video_features"])
    with pytest.raises(ValueError, match=r"video_feature_dim=6\), not \(3, 9, 5\)"):
        model(inputs["video_features"][..., :5], text_features=inputs["text_features"])
    with pytest.raises(ValueError, match=r"text_mask must be \(3, 4\), not \(3, 3\)"):
        model(**{**inputs, "text_mask": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        model(**inputs, span_labels=[torch.zeros(1, 2)] * 2)
    with pytest.raises(ValueError, match=r"must be \(moments, 2\), not \(2,\)"):
        model(**inputs, span_labels=[torch.zeros(2)] * 3)
    classifier = small_model(span_loss_type="ce", num_span_bins=9)
    with pytest.raises(ValueError, match="needs int64 clip indices"):
        classifier(**inputs, span_labels=[torch.zeros(1, 2)] * 3)
    with pytest.raises(ValueError, match=r"not in \[0, 9\)"):
        classifier(**inputs, span_labels=[torch.tensor([[0, 9]])] * 3)
    with pytest.raises(ValueError, match="the table of text positions has 2 rows"):
        small_model(use_text_positions=True, max_text_positions=2)(**inputs)
    for options, message in [
        ({"span_loss_type": "l2"}, "must be 'l1' or 'ce', not 'l2'"),
        ({"num_input_projections": 4}, "must be 1, 2 or 3, not 4"),
        ({"d_model": 18}, "a multiple of num_attention_heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            MomentDetrConfig(**{**SMALL, **options})
    with pytest.raises(ValueError, match="only 'sine' exists"):
        MomentDetrConfig.from_original_options({"position_embedding": "learned"})
