"""UMT: parity with the original, every option against plain formulas, targets, losses, checkpoints."""

import math

import pytest
import torch
from golden_cases import golden_case, record_outputs
from transformers import AutoConfig, AutoModel

from peft_read.models import UMTConfig, UMTForTemporalGrounding
from peft_read.models.umt.loss_umt import boundary_losses, boundary_targets, saliency_loss

SMALL = {
    "video_feature_dim": 6,
    "audio_feature_dim": 5,
    "text_feature_dim": 7,
    "d_model": 16,
    "num_attention_heads": 4,
    "ffn_ratio": 2,
    "max_positions": 12,
}
BOTH = ["saliency", "boundary"]
OPTIONS = {
    "highlights, query": {},
    "highlights, no query": {"text_feature_dim": None},
    "joint, three decoder layers": {"decoder_layers": 3, "heads": BOTH, "saliency_loss_weight": 3.0},
    "moments, two cross layers": {
        "decoder_layers": 3,
        "cross_layers": 2,
        "heads": ["boundary"],
        "clip_seconds": 1 / 6,
    },
    "mean": {"fusion_type": "mean", "encoder_layers": 2},
    "concat": {"fusion_type": "concat"},
    "video only": {"audio_feature_dim": None},
    "several predicting layers": {
        "decoder_layers": 3,
        "heads": BOTH,
        "pred_layers": [0, -1],
        "loss_layers": [1, 2],
    },
}


def small_model(**options):
    model = UMTForTemporalGrounding(UMTConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


LENGTHS = [(9, 4), (6, 2), (1, 1)]


def batch(model):
    clips = torch.arange(9) < torch.tensor([clips for clips, _ in LENGTHS])[:, None]
    words = torch.arange(4) < torch.tensor([words for _, words in LENGTHS])[:, None]
    inputs = {"video_features": torch.randn(3, 9, 6) * clips[..., None], "video_mask": clips}
    if model.config.audio_feature_dim is not None:
        inputs["audio_features"] = torch.randn(3, 9, 5) * clips[..., None]
    if model.config.text_feature_dim is not None:
        inputs |= {"text_features": torch.randn(3, 4, 7) * words[..., None], "text_mask": words}
    return inputs


def labels(model):
    seconds = model.config.clip_seconds
    windows = (
        torch.tensor([[[0.0, 4.0], [5.0, 9.0]], [[1.0, 5.0], [-1.0, -1.0]], [[0.0, 1.0], [-1.0, -1.0]]]) * seconds
    )
    real = torch.tensor([[1, 1], [1, 0], [1, 0]])
    return {"saliency_labels": torch.rand(3, 9), "boundary_labels": windows, "boundary_mask": real}


def test_everything_equals_the_original(reference_data):
    golden, notes = golden_case(reference_data("golden/umt/youtube_hd_noquery.safetensors"))
    config = UMTConfig.from_original_options(notes["config"])
    model = UMTForTemporalGrounding.from_original_checkpoint(golden["state_dict"], config)
    inputs, close = golden["inputs"], {"rtol": 1e-4, "atol": 1e-4}
    seen, exchanged = record_outputs(model), {}
    model.cross_enc.encoder.encoder[0].register_forward_hook(
        lambda module, args, output: exchanged.update(enumerate(output))
    )
    model.query_dec.register_forward_hook(lambda module, args, output: seen.update({"query_dec.0": output[0]}))
    output = model(inputs["video"], inputs["audio"], saliency_labels=inputs["saliency"])
    torch.testing.assert_close(output.saliency_scores, golden["outputs"]["saliency"], **close)
    raw = golden["outputs"]["pred_head.0.saliency_pred.raw"]
    torch.testing.assert_close(seen["pred_head.0.saliency_pred"].squeeze(-1), raw, **close)
    torch.testing.assert_close(output.loss, golden["losses"]["loss"], **close)
    torch.testing.assert_close(output.loss_dict["d0.saliency_loss"], golden["losses"]["d0.saliency_loss"], **close)
    assert output.boundaries is None
    for name, expected in golden["hidden"].items():
        if name.startswith("cross_enc.encoder.encoder.0.") and name[-1].isdigit():
            actual = exchanged[int(name[-1])]
        else:
            actual = seen[name.replace("_out", "")]
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


def attention_by_hand(module, query, key, value):
    """Multi-head attention of one unpadded example (L, d), head by head."""
    q, k, v = module.q(query), module.k(key), module.v(value)
    size = q.shape[1] // module.heads
    heads = [slice(size * h, size * (h + 1)) for h in range(module.heads)]
    mixed = [(q[:, h] @ k[:, h].T / math.sqrt(size)).softmax(-1) @ v[:, h] for h in heads]
    return module.m(torch.cat(mixed, dim=1))


def feed_forward_by_hand(module, x):
    return module.mapping[3](module.mapping[0](x).relu())


def forward_by_hand(model, video, audio, text):
    """The normalised decoder states of one unpadded example, from the formulas alone."""
    length = len(video)

    def positions(module):
        return module.pe[0, :length]

    def unimodal(module, features):
        x, code = module.mapping.linear(features), positions(module.pos_enc)
        for layer in module.encoder if model.config.encoder_layers > 1 else [module.encoder]:
            y = layer.norm1(x)
            x = x + attention_by_hand(layer.att, y + code, y + code, y)
            x = x + feed_forward_by_hand(layer.ffn, layer.norm2(x))
        return x

    clips = unimodal(model.video_enc, video)
    if audio is not None:
        cross, a, b = model.cross_enc, clips, unimodal(model.audio_enc, audio)
        t, code = cross.encoder.token, positions(cross.pos_enc)
        for layer in cross.encoder.encoder:
            da, db, dt = layer.norm1(a), layer.norm2(b), layer.norm3(t)
            t = t + attention_by_hand(layer.att1, dt, da + code, da) + attention_by_hand(layer.att2, dt, db + code, db)
            dt = layer.norm4(t)
            a = a + attention_by_hand(layer.att3, da + code, dt, dt)
            b = b + attention_by_hand(layer.att4, db + code, dt, dt)
            a = a + feed_forward_by_hand(layer.ffn1, layer.norm5(a))
            b = b + feed_forward_by_hand(layer.ffn2, layer.norm6(b))
        joint = {"sum": lambda: a + b, "mean": lambda: (a + b) / 2}
        joint["concat"] = lambda: cross.mapping.linear(torch.cat([a, b], dim=1))
        clips = cross.norm(joint[model.config.fusion_type]())
    x = clips
    if text is not None:
        words = model.query_gen.mapping.norm(model.query_gen.mapping.linear(text))
        x = attention_by_hand(model.query_gen.encoder, clips, words, words)
    decoder, states = model.query_dec, []
    for layer in decoder.decoder:
        y = layer.norm1(x)
        query_code, key_code = positions(decoder.q_pos_enc), positions(decoder.k_pos_enc)
        x = x + attention_by_hand(layer.att1, y + query_code, y + query_code, y)
        x = x + attention_by_hand(layer.att2, layer.norm2(x) + query_code, clips + key_code, clips)
        x = x + feed_forward_by_hand(layer.ffn, layer.norm3(x))
        states.append(decoder.norm(x))
    return states


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_follows_its_formula(options):
    # with mask_decoder, batches do not mix with their padding, so every row is its unpadded example
    model = small_model(**options, mask_decoder=True)
    inputs, config = batch(model), model.config
    output = model(**inputs)
    for i, (clips, words) in enumerate(LENGTHS):
        audio = inputs["audio_features"][i, :clips] if "audio_features" in inputs else None
        text = inputs["text_features"][i, :words] if "text_features" in inputs else None
        states = forward_by_hand(model, inputs["video_features"][i, :clips], audio, text)
        close = {"rtol": 1e-4, "atol": 1e-5}
        if "saliency" in config.heads:
            head = model.pred_head[config.heads.index("saliency")].saliency_pred.linear
            scores = torch.stack([head(states[layer]).sigmoid().squeeze(-1) for layer in config.pred_layers])
            torch.testing.assert_close(output.saliency_scores[i, :clips], scores.mean(0), **close)
            assert not output.saliency_scores[i, clips:].any()
        if "boundary" in config.heads:
            head = model.pred_head[config.heads.index("boundary")]
            for layer in config.pred_layers:
                center = head.center_pred.linear(states[layer]).sigmoid().squeeze(-1)
                best = center.argmax()
                middle = best + head.offset_pred.linear(states[layer])[best].clamp(min=0)
                half = head.window_pred.linear(states[layer])[best].clamp(min=0) / 2
                unit = config.clip_seconds
                window = [(middle - half).clamp(0, 8) * unit, (middle + half).clamp(0, 8) * unit + unit]
                row = torch.cat([*window, center[best][None]])
                # The best of a layer is as good as so many of all layers, in the order of scores.
                found = (output.boundaries[i] - row).abs().sum(-1).argmin()
                torch.testing.assert_close(output.boundaries[i, found], row, **close)
                assert len(config.pred_layers) > 1 or found == 0
    if "boundary" in config.heads:
        assert output.boundaries.shape == (3, 9 * len(config.pred_layers), 3)
        assert (output.boundaries[..., 2].diff(dim=1) <= 0).all()
    else:
        assert output.boundaries is None


def test_the_original_decoder_sees_padding():
    model = small_model()
    inputs = batch(model)
    alone = {name: value[1:2, : 2 if name.startswith("text") else 6] for name, value in inputs.items()}
    together, separate = model(**inputs).saliency_scores[1:2, :6], model(**alone).saliency_scores
    assert not torch.allclose(together, separate, atol=1e-4)
    model.query_dec.mask_attention = True
    torch.testing.assert_close(model(**inputs).saliency_scores[1:2, :6], model(**alone).saliency_scores)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_complete_and_train(options):
    model = small_model(**options)
    config = model.config
    targets = labels(model)
    before = targets["boundary_labels"].clone()
    output = model(**batch(model), **targets)
    assert targets["boundary_labels"].equal(before)
    supervised = config.loss_layers or [config.decoder_layers - 1]
    terms = {"saliency": ["saliency_loss"], "boundary": ["center_loss", "window_loss", "offset_loss"]}
    assert set(output.loss_dict) == {
        f"d{i}.{term}" for i in supervised for head in config.heads for term in terms[head]
    }
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_heat_maps_by_hand():
    config = UMTConfig()
    windows = torch.tensor([[[0.0, 24.0], [10.0, 14.0], [-1.0, -1.0]]])
    targets = boundary_targets(windows, None, 12, config)
    # in clips: [0, 11], centre 5.5, length 11, radius 2, sigma 0.6; [5, 6], centre 5.5, length 1, radius 0, sigma 0.2
    heat = [0.0] * 12
    for x in range(-2, 3):
        heat[5 + x] = math.exp(-(x**2) / (2 * 0.6**2))
    assert targets.center[0].tolist() == pytest.approx(heat)
    assert targets.window[0, 5] == 1  # the later window
    assert targets.offset[0, 5] == 0.5
    assert targets.weight[0].tolist() == [0.0] * 5 + [1.0] + [0.0] * 6
    assert targets.windows == 2
    # a centre after the last clip is cut at L - 0.5
    late = boundary_targets(torch.tensor([[[22.0, 30.0]]]), None, 12, config)
    assert late.weight[0, 11] == 1
    assert late.offset[0, 11] == 0.5
    none = boundary_targets(torch.zeros(2, 0, 2), None, 5, config)
    assert none.windows == 0
    assert not none.center.any()


def test_losses_by_hand():
    config = UMTConfig(center_loss_weight=2.0, window_loss_weight=0.5)
    windows = torch.tensor([[[4.0, 6.0]]])  # clip 2, length 0
    targets = boundary_targets(windows, torch.tensor([[1]]), 4, config)
    assert targets.center.tolist() == [[0, 0, 1, 0]]
    center = torch.tensor([[0.5, 0.0, 0.25, 0.75]])
    mask = torch.tensor([[True, True, True, False]])
    losses = boundary_losses(center, torch.full((1, 4), 3.0), torch.full((1, 4), -1.0), targets, mask, config)
    focal = -math.log(0.25) * 0.75**2 - math.log(0.5) * 0.5**2
    assert losses["center_loss"].item() == pytest.approx(2 * focal, rel=1e-5)
    assert losses["window_loss"].item() == pytest.approx(0.5 * 3)
    assert losses["offset_loss"].item() == pytest.approx(1.0)
    logits, soft = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.25, -1.0]])
    real = torch.tensor([[True, False]])
    entropy = math.log(2)
    assert saliency_loss(logits, soft, real, UMTConfig(saliency_loss_weight=3.0)).item() == pytest.approx(
        3 * entropy / 2
    )
    over_real = UMTConfig(saliency_over_padding=False)
    assert saliency_loss(logits, soft, real, over_real).item() == pytest.approx(entropy)


def test_masks_may_come_from_labels_and_infinite_text():
    model = small_model(decoder_layers=2, heads=BOTH)
    inputs, targets = batch(model), labels(model)
    targets["saliency_labels"][~inputs["video_mask"]] = -1
    expected = model(**inputs, **targets)
    infinite = inputs["text_features"].masked_fill(~inputs["text_mask"][..., None], math.inf)
    given = infinite.clone()
    output = model(inputs["video_features"], inputs["audio_features"], given, **targets)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.saliency_scores, expected.saliency_scores)
    assert given.equal(infinite)
    for dtype in (torch.float32, torch.int64):
        other = {name: value.to(dtype) if name.endswith("mask") else value for name, value in inputs.items()}
        torch.testing.assert_close(model(**other, **targets).loss, expected.loss)
    inputs["video_mask"][1], inputs["text_mask"][1] = False, False
    assert model(**inputs).saliency_scores.isfinite().all()


def test_labels_without_their_head_are_ignored():
    model = small_model()
    inputs, targets = batch(model), labels(model)
    only = model(**inputs, boundary_labels=targets["boundary_labels"])
    assert only.loss is None
    assert set(model(**inputs, **targets).loss_dict) == {"d0.saliency_loss"}


def test_every_encoder_gets_the_mask_by_name():
    model = small_model()
    inputs, heard = batch(model), {}
    for name in ("video_enc", "audio_enc", "cross_enc", "query_dec", "video_enc.encoder", "cross_enc.encoder"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: heard.update({name: kwargs["attention_mask"]}), with_kwargs=True
        )
    model(**inputs)
    assert len(heard) == 6
    assert all(mask.equal(inputs["video_mask"]) for mask in heard.values())


def test_videos_of_any_length():
    model = small_model(max_positions=2000, heads=BOTH)
    for clips in (1, 150, 2000):
        output = model(torch.randn(1, clips, 6), torch.randn(1, clips, 5), torch.randn(1, 3, 7))
        assert output.saliency_scores.shape == (1, clips)
        assert output.boundaries.shape == (1, min(100, clips), 3)
    with pytest.raises(ValueError, match="2001 clips, but the position table has 2000 rows"):
        model(torch.randn(1, 2001, 6), torch.randn(1, 2001, 5), torch.randn(1, 3, 7))


def test_save_and_load_and_initialisation(tmp_path):
    model = small_model(heads=BOTH, decoder_layers=2)
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UMTConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, UMTForTemporalGrounding)
    torch.testing.assert_close(loaded(**inputs).boundaries, model(**inputs).boundaries)
    fresh = UMTForTemporalGrounding(UMTConfig())
    assert 0.95 / 16 < fresh.cross_enc.pos_enc.pe.std() < 1.05 / 16
    assert 0.8 / 16 < fresh.cross_enc.encoder.token.std() < 1.2 / 16
    xavier = math.sqrt(2 / (256 + 1024))
    assert 0.97 * xavier < fresh.query_dec.decoder[0].ffn.mapping[0].weight.std() < 1.03 * xavier
    assert not fresh.video_enc.encoder.att.q.bias.any()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"text_feature_dim": None}, 12_191_233),
        ({}, 12_585_985),
        ({"video_feature_dim": 2816, "decoder_layers": 3, "heads": BOTH}, 14_890_244),
        ({"video_feature_dim": 4096, "text_feature_dim": 300, "decoder_layers": 3, "heads": ["boundary"]}, 15_163_395),
    ],
    ids=["YouTube Highlights", "TVSum", "QVHighlights", "Charades-STA"],
)
def test_published_sizes(options, count):
    with torch.device("meta"):
        model = UMTForTemporalGrounding(UMTConfig(**options))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def original_options(**changes):
    table, layer = {"type": "PositionalEncoding"}, {"heads": 4, "ratio": 2}
    stream = {"pos_cfg": table, "enc_cfg": layer}
    options = {
        "video_enc": {**stream, "dims": [6, 16]},
        "audio_enc": {**stream, "dims": [5, 16]},
        "cross_enc": {"dims": 16, "pos_cfg": table, "enc_cfg": {**layer, "num_layers": 2}, "fusion_type": "mean"},
        "query_gen": {"dims": [7, 16], "enc_cfg": layer},
        "query_dec": {"dims": 16, "pos_cfg": table, "dec_cfg": [layer, layer, layer]},
        "pred_head": [
            {"type": "SaliencyHead", "saliency_loss": {"loss_weight": 3.0}, "pred_indices": [0, -1]},
            {"type": "BoundaryHead", "unit": 1 / 6, "window_loss": {"loss_weight": 0.05}, "pred_indices": [0, -1]},
        ],
    }
    return {**options, **changes}


def test_original_options_and_wrapped_checkpoints(tmp_path):
    config = UMTConfig.from_original_options(original_options())
    expected = UMTConfig(
        video_feature_dim=6,
        audio_feature_dim=5,
        text_feature_dim=7,
        d_model=16,
        num_attention_heads=4,
        ffn_ratio=2,
        cross_layers=2,
        decoder_layers=3,
        fusion_type="mean",
        heads=BOTH,
        saliency_loss_weight=3.0,
        window_loss_weight=0.05,
        clip_seconds=1 / 6,
        pred_layers=[0, -1],
    )
    assert config.to_dict() == expected.to_dict()
    unweighted = {"type": "BoundaryHead", "window_loss": {"type": "L1Loss"}}  # nncore's weight is 1
    given = UMTConfig.from_original_options(original_options(pred_head=unweighted))
    assert (given.window_loss_weight, given.offset_loss_weight) == (1.0, 1.0)
    assert (
        UMTConfig.from_original_options(original_options(pred_head={"type": "BoundaryHead"})).window_loss_weight == 0.1
    )
    repeated = original_options(query_dec={"dims": 16, "dec_cfg": {"heads": 4, "ratio": 2, "_repeat_": 3}})
    assert UMTConfig.from_original_options(repeated).decoder_layers == 3
    model = UMTForTemporalGrounding(config)
    path = tmp_path / "epoch_100.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}, "meta": {}}, path)
    loaded = UMTForTemporalGrounding.from_original_checkpoint(path, config)
    assert all(value.equal(loaded.state_dict()[key]) for key, value in model.state_dict().items())
    for changes, message in [
        ({"audio_enc": None}, "both or neither of audio_enc and cross_enc"),
        ({"video_enc": {"dims": [6, 8, 16], "enc_cfg": {}}}, r"must be \[features, width\]"),
        ({"query_dec": {"dec_cfg": {"heads": 2, "ratio": 2}}}, "heads must be the same everywhere"),
        ({"query_dec": {"dec_cfg": [{"heads": 4}, {"heads": 2}]}}, "layers of a stack must be equal"),
        ({"pred_head": {"type": "OtherHead"}}, r"not \['OtherHead'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            UMTConfig.from_original_options(original_options(**changes))


def test_checkpointed_gradients_are_the_same():
    model = small_model(dropout=0.0, input_dropout=0.0, text_dropout=0.0, heads=BOTH)
    inputs, targets, gradients = batch(model), labels(model), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, **targets).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_failures():
    model = small_model()
    inputs = batch(model)
    for changes, message in [
        ({"audio_features": None}, "audio_features are missing"),
        ({"audio_features": torch.zeros(3, 8, 5)}, r"must be \(batch, 9, 5\), not \(3, 8, 5\)"),
        ({"video_features": torch.zeros(3, 9, 5)}, r"must be \(batch, L, 6\), not \(3, 9, 5\)"),
        ({"text_features": None}, r"text_feature_dim=7\), not None"),
        ({"text_mask": torch.ones(3, 3)}, r"text_mask must be \(3, 4\), not \(3, 3\)"),
        ({"video_mask": torch.ones(3, 3)}, r"video_mask must be \(3, 9\), not \(3, 3\)"),
        ({"saliency_labels": torch.ones(3, 3)}, r"saliency_labels must be \(3, 9\), not \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **changes})
    with pytest.raises(ValueError, match="audio_features are given, and the configuration has audio_feature_dim=None"):
        small_model(audio_feature_dim=None)(**inputs)
    for options, message in [
        ({"d_model": 18}, "multiple of num_attention_heads"),
        ({"fusion_type": "max"}, "must be 'sum', 'mean' or 'concat', not 'max'"),
        ({"heads": ["center"]}, r"not \['center'\]"),
        ({"heads": []}, r"not \[\]"),
        ({"pred_layers": [1]}, "names a layer that is not one of 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            UMTConfig(**{**SMALL, **options})
