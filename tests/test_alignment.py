"""The alignment loss and its streams: known answers, masks, recording, failures."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_read import Aligner, PVLAConfig, PVLALoss, READConfig, Stream, models, partial_optimal_transport
from peft_read.alignment import alignment_distance
from peft_read.transport import cosine_cost


def states(batch=2, frames=5, words=4, width=6):
    return torch.randn(batch, frames, width), torch.randn(batch, words, width)


def test_the_same_orthogonal_tokens_are_aligned_and_opposite_ones_are_not():
    tokens = torch.eye(6).unsqueeze(0)
    assert PVLALoss()(tokens, tokens) < 1e-6
    assert torch.isclose(PVLALoss(mass=1.0)(tokens, tokens), torch.tensor(0.0), atol=1e-6)
    one = torch.ones(1, 1, 6)
    assert torch.isclose(PVLALoss()(one, -one), torch.tensor(2.0))


def test_partial_transport_ignores_the_half_that_has_no_match():
    words = torch.eye(4).unsqueeze(0)
    frames = torch.cat([words[:, :2], -torch.ones(1, 2, 4)], dim=1)  # two frames match, two resemble nothing
    assert PVLALoss(mass=0.5)(frames, words) < 1e-5
    assert PVLALoss(mass=1.0)(frames, words) > 0.5


def test_the_loss_is_the_mean_of_cost_over_mass():
    video, language = states()
    plan = partial_optimal_transport(cosine_cost(video, language), mass=0.3)
    assert torch.isclose(PVLALoss(mass=0.3)(video, language), (plan.cost / 0.3).mean(), rtol=1e-4)


def test_blocks_of_different_lengths_are_averaged():
    first, second = states(), states(frames=3, words=7)
    loss = PVLALoss()
    both = loss([first[0], second[0]], [first[1], second[1]])
    assert torch.isclose(both, (loss(*first) + loss(*second)) / 2, rtol=1e-4)


@pytest.mark.parametrize("distance", ["partial_ot", "avg_cosine", "max_cosine", "avg_l2", "max_l2"])
def test_padding_is_invisible(distance):
    video, language = states()
    loss = PVLALoss(distance=distance)
    padded_video = torch.cat([video, torch.full((2, 3, 6), 50.0)], dim=1).requires_grad_()
    padded_language = torch.cat([torch.full((2, 2, 6), -50.0), language], dim=1)
    video_mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    language_mask = torch.tensor([[0] * 2 + [1] * 4] * 2, dtype=torch.float)
    padded = loss(padded_video, padded_language, video_mask, language_mask)
    assert torch.isclose(padded, loss(video, language), rtol=1e-4)
    padded.backward()
    assert padded_video.grad[:, 5:].abs().max() == 0


def test_pooled_distances_have_their_closed_forms():
    video = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    language = torch.tensor([[[1.0, 1.0]]])
    expected = {
        "avg_cosine": 1 - 1.5 / (1.25**0.5 * 2**0.5),
        "max_cosine": 1 - 3 / (5**0.5 * 2**0.5),
        "avg_l2": (0.5**2 + 0) / 2,
        "max_l2": (0 + 1) / 2,
    }
    for distance, value in expected.items():
        assert float(PVLALoss(distance=distance)(video, language)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("distance", ["partial_ot", "avg_cosine", "max_l2"])
def test_an_example_without_video_has_no_distance_and_no_gradient(distance):
    video, language = states()
    video.requires_grad_()
    mask = torch.ones(2, 5)
    mask[1] = 0
    result = alignment_distance(video, language, mask, distance=distance)
    assert result.distance[0, 1] == 0
    assert result.mass[0, 1] == 0
    result.distance.sum().backward()
    assert video.grad[1].abs().max() == 0
    assert torch.isfinite(video.grad).all()
    assert video.grad[0].abs().max() > 0


def test_bfloat16_states_and_autocast_are_solved_in_float32():
    video, language = states()
    exact = PVLALoss()(video.bfloat16().float(), language.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = PVLALoss()(video.bfloat16(), language.bfloat16())
    assert loss.dtype == torch.float32
    assert torch.isclose(loss, exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "median"}, "is not one of"),
        ({"mass": 0.0}, "outside"),
        ({"mass": 1.5}, "outside"),
        ({"reg": 0.0}, "positive"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PVLALoss(**arguments)
    with pytest.raises(ValueError, match=message):
        PVLAConfig(**arguments)


def test_shapes_that_do_not_belong_together_are_named():
    video, language = states()
    widths = rf"^video states .* and language states .*: widths {video.shape[2]} and 3 differ; project one of them"
    with pytest.raises(ValueError, match=widths):
        PVLALoss()(video, language[..., :3])
    with pytest.raises(ValueError, match=r"^block 1: .*the language states have 2 dimensions and need three"):
        PVLALoss()([video, video], [language, language[0]])
    with pytest.raises(ValueError, match=r"^video states .*: the language states hold no token at all"):
        PVLALoss()(video, language[:, :0])
    with pytest.raises(ValueError, match="cannot be paired"):
        PVLALoss()([video, video], [language])
    with pytest.raises(ValueError, match=r"^the video mask has shape \(2, 4\), and the states that it describes"):
        PVLALoss()(video, language, torch.ones(2, 4))


def test_batch_sizes_that_differ_are_named_in_words():
    message = (
        "video states (2, 75, 64) and language states (3, 12, 64): batch sizes 2 and 3 differ; a row of the video "
        "states and the same row of the language states are one example"
    )
    with pytest.raises(ValueError) as error:
        PVLALoss()(torch.randn(2, 75, 64), torch.randn(3, 12, 64))
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        PVLALoss()([torch.randn(2, 75, 64)] * 2, [torch.randn(2, 12, 64), torch.randn(3, 12, 64)])
    assert str(error.value) == f"block 1: {message}"


@pytest.mark.parametrize("distance", ["partial_ot", "avg_cosine"])
def test_a_token_that_is_not_finite_is_named_by_side(distance):
    video, language = states()
    language = torch.cat([language[:, :1], torch.full_like(language[:, 1:], torch.nan)], 1)
    with pytest.raises(ValueError, match=r"^a token of the language states outside the padding is NaN or infinite"):
        PVLALoss(distance=distance)(video, language)
    with pytest.raises(ValueError, match=r"^block 1: a token of the language states"):
        PVLALoss(distance=distance)([video, video], [video, language])


def tiny_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def batch(size=3, length=7, target=5):
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, 5:] = 0
    return {
        "input_ids": torch.randint(4, 40, (size, length)),
        "attention_mask": mask,
        "labels": torch.randint(4, 40, (size, target)),
    }


ENCODER = r"model\.encoder\.layers\.\d+"
SLICED = PVLAConfig(
    video=Stream(ENCODER, tokens=slice(0, 3), mask=lambda b: b["attention_mask"][:, :3]),
    language=Stream(ENCODER, tokens=lambda b, length: slice(3, length), mask=lambda b: b["attention_mask"][:, 3:]),
)


def test_streams_find_the_states_that_hidden_states_report():
    model, inputs = tiny_bart(), batch()
    aligner = Aligner(model, SLICED)
    with aligner.record() as recording:
        outputs = model(**inputs, output_hidden_states=True)
    blocks = aligner.blocks(recording, inputs)
    assert len(blocks) == 2
    for block, hidden in zip(blocks, outputs.encoder_hidden_states[1:], strict=True):
        assert torch.equal(block.video, hidden[:, :3])
        assert torch.equal(block.language, hidden[:, 3:])
        assert block.language_mask.tolist()[0] == [True, True, False, False]


def test_a_recording_ends_with_its_context_and_nothing_is_kept():
    model, inputs = tiny_bart(), batch()
    aligner = Aligner(model, SLICED)
    with aligner.record() as recording:
        model(**inputs)
    count = len(recording.states)
    model(**inputs)
    model.generate(inputs["input_ids"], max_new_tokens=3)
    assert len(recording.states) == count == 4
    aligner.remove()
    with aligner.record() as recording:
        model(**inputs)
    assert not recording.states


def test_two_forward_passes_in_one_recording_are_an_error():
    model, inputs = tiny_bart(), batch()
    aligner = Aligner(model, SLICED)
    with aligner.record(), pytest.raises(RuntimeError, match="ran twice"):
        model(**inputs)
        model(**inputs)


def test_one_module_is_broadcast_and_blocks_can_be_chosen():
    model, inputs = tiny_bart(), batch()
    single = Stream(["model.encoder.layernorm_embedding"], tokens=slice(0, 3))
    config = PVLAConfig(video=single, language=SLICED.language)
    aligner = Aligner(model, config)
    assert len(aligner.pair.names) == 2
    assert aligner.describe(model, inputs).count("layernorm_embedding") == 2
    last = Aligner(model, PVLAConfig(video=single, language=SLICED.language, blocks=[-1]))
    assert [name for _, name in last.pair.names] == ["model.encoder.layers.1"]


def test_input_output_and_layout_of_a_stream():
    class SequenceFirst(nn.Module):
        def forward(self, states, other=None):
            return {"other": states + 1, "states": states * 2}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SequenceFirst()

        def forward(self, states):
            return self.inner(states.transpose(0, 1))

    model, x = Model(), torch.randn(2, 5, 3, requires_grad=True)
    config = PVLAConfig(
        video=Stream(["inner"], output="states", batch_first=False),
        language=Stream(["inner"], input=True, batch_first=False),
    )
    aligner = Aligner(model, config)
    with aligner.record() as recording:
        model(x)
    (block,) = aligner.blocks(recording, {})
    assert torch.equal(block.video, x * 2)
    assert torch.equal(block.language, x)


def test_a_mask_is_asked_for_once_per_pass_and_mixed_masks_are_those_of_each_block():
    asked = []

    def mask(batch):
        asked.append(batch)
        return batch["attention_mask"][:, :3]

    model, inputs = tiny_bart(), batch()
    video = Stream(ENCODER, tokens=slice(0, 3), mask=mask)
    aligner = Aligner(model, PVLAConfig(video=video, language=SLICED.language))
    with aligner.record() as recording:
        model(**inputs)
    found = aligner.distance(recording, inputs).distance
    assert len(asked) == 1 and len(found) == 2

    first, second = states(), states()
    padding = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    for masks in ([None, padding], [padding, padding], [padding, padding.clone()]):
        both = alignment_distance([first[0], second[0]], [first[1], second[1]], masks)
        for one, (pair, single) in enumerate(zip((first, second), masks, strict=True)):
            alone = alignment_distance(*pair, single)
            torch.testing.assert_close(both.distance[one], alone.distance[0], rtol=1e-4, atol=1e-6)


def test_inverted_masks_and_extractors():
    model, inputs = tiny_bart(), batch()
    inputs["padding"] = 1 - inputs["attention_mask"]
    inverted = Stream(ENCODER, mask="padding", invert_mask=True)
    aligner = Aligner(model, PVLAConfig(video=inverted, language=inverted))
    forward = {key: value for key, value in inputs.items() if key != "padding"}
    with aligner.record() as recording:
        model(**forward)
    mask = aligner.blocks(recording, inputs)[0].video_mask
    assert torch.equal(mask, inputs["attention_mask"] != 0)

    def extractor(batch, outputs):
        hidden = outputs.encoder_hidden_states[-1]
        yield hidden[:, :3], hidden[:, 3:], None, batch["attention_mask"][:, 3:]

    aligner = Aligner(model, PVLAConfig(extractor=extractor, weight=2.0))
    with aligner.record() as recording:
        outputs = model(**forward, output_hidden_states=True)
    loss = aligner.loss(recording, inputs, outputs)
    hidden = outputs.encoder_hidden_states[-1]
    expected = PVLALoss()(hidden[:, :3], hidden[:, 3:], None, inputs["attention_mask"][:, 3:])
    assert torch.isclose(loss, 2 * expected)


def video_model(kind):
    """A tiny backbone of the project and a batch for it: 2 items, 6 frames of 8 numbers, 5 words."""
    torch.manual_seed(0)
    video = {"video_features": torch.randn(2, 6, 8), "video_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    text_mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    guided = {
        **video,
        "input_ids": torch.randint(4, 40, (2, 5)),
        "attention_mask": text_mask,
        "labels": torch.randint(4, 40, (2, 3)),
    }
    pairs = {**video, "text_features": torch.randn(2, 5, 7), "text_mask": text_mask}
    if kind.startswith("vg_bart"):
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "img_trans_heads": 2, "n_attn_heads": 2}
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        options = {"visual_feature_dim": 8, "dim_common": 16, "cross_attn_type": int(kind[-1])}
        config = models.VGBartConfig(
            vocab_size=40, d_model=16, max_position_embeddings=32, **sizes, **heads, **options
        )
        return models.VGBartForConditionalGeneration(config), guided
    if kind == "vg_t5":
        sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        config = models.VGT5Config(vocab_size=40, d_model=16, visual_feature_dim=8, **sizes)
        return models.VGT5ForConditionalGeneration(config), guided
    if kind == "moment_detr":
        widths = {"video_feature_dim": 8, "text_feature_dim": 7}
        return models.MomentDetrForTemporalGrounding(models.MomentDetrConfig(d_model=16, **widths)), pairs
    widths = {"video_feature_dim": 8, "text_feature_dim": 7, "audio_feature_dim": None}
    if kind == "umt_audio":
        widths = {"video_feature_dim": 8, "text_feature_dim": None, "audio_feature_dim": 9}
        pairs = {**video, "audio_features": torch.randn(2, 6, 9)}
    return models.UMTForTemporalGrounding(models.UMTConfig(d_model=16, max_positions=8, **widths)), pairs


@pytest.mark.parametrize(
    ("kind", "blocks", "frames", "words"),
    [
        *((f"vg_bart_{number}", 2, 6, 5) for number in (0, 1, 2)),
        *((f"vg_bart_{number}", 1, 6, 5) for number in (3, 4, 5)),
        ("vg_t5", 2, 6, 5),
        ("moment_detr", 2, 6, 5),
        ("umt", 2, 6, 5),
        ("umt_audio", 1, 6, 6),
    ],
)
def test_presets_find_both_streams_of_the_projects_backbones(kind, blocks, frames, words):
    model, inputs = video_model(kind)
    aligner = Aligner(model, PVLAConfig())
    with aligner.record() as recording:
        outputs = model(**inputs)
    actual = aligner.blocks(recording, inputs, outputs)
    assert len(actual) == blocks
    for block in actual:
        assert block.video.shape[:2] == (2, frames)
        assert block.language.shape[:2] == (2, words)
        assert block.video_mask.sum() == 10
        assert block.language_mask.sum() == (10 if kind == "umt_audio" else 8)
    loss = aligner.loss(recording, inputs, outputs)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_schedules_follow_the_progress_of_training():
    config = PVLAConfig(weight=lambda progress: 0.1 * progress, mass=lambda progress: 0.5 + 0.5 * progress)
    assert config.weight_at(0.5) == pytest.approx(0.05)
    assert config.mass_at(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PVLAConfig(),
            r"BartForConditionalGeneration \(model_type='bart'\) has the states .* does not put the features",
        ),
        (PVLAConfig(video=Stream("nothing"), language=Stream(ENCODER)), "no module .* matches 'nothing'; some of its"),
        (
            PVLAConfig(video=Stream(["model.encodr"]), language=Stream(ENCODER)),
            "has no modules .*names: model.encoder,",
        ),
        (
            PVLAConfig(video=Stream(r"model\.encoder\.layer\.\d+"), language=Stream(ENCODER)),
            r"; near names: model\.encoder\.layers\.0,",
        ),
        (
            PVLAConfig(video=Stream(r"model\.encoder\.layers\.\d\.(fc1|fc2)"), language=Stream(ENCODER)),
            "4 video modules .* and 2 language modules",
        ),
        (PVLAConfig(video=Stream(ENCODER), language=Stream(ENCODER), blocks=[5]), "blocks=5 does not exist"),
    ],
)
def test_streams_that_do_not_fit_the_model_say_what_there_is(config, message):
    with pytest.raises(ValueError, match=message):
        Aligner(tiny_bart(), config)


def test_the_way_out_of_a_model_without_known_streams_runs_as_it_is_printed():
    model = tiny_bart()
    with pytest.raises(ValueError) as error:
        Aligner(model, PVLAConfig())
    _, first, second, _ = str(error.value).split("\n")
    config = eval(f"{first.strip()}{second.strip()}", {"PVLAConfig": PVLAConfig, "Stream": Stream})
    ids = torch.randint(4, 20, (2, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :2]}
    aligner = Aligner(model, config)
    with aligner.record() as recording:
        model(**inputs)
    for block in aligner.blocks(recording, inputs):
        assert (block.video.shape[1], block.language.shape[1]) == (16, 8) and block.language_mask.all()


def test_names_in_stream_errors_are_those_of_the_model_without_peft():
    model = get_peft_model(tiny_bart(), READConfig())
    outer = rf"base_model\.model\.{ENCODER}"
    with pytest.raises(ValueError, match="those of the model without its wrappers: ") as error:
        Aligner(model, PVLAConfig(video=Stream(outer), language=Stream(ENCODER)))
    assert str(error.value).endswith(repr(ENCODER))
    with pytest.raises(ValueError, match=r"\(no base_model\.model\.\); near names: model\.encoder\.layers\.0\.fc2"):
        Aligner(
            model, PVLAConfig(video=Stream(["base_model.model.model.encoder.layers.1.fc22"]), language=Stream(ENCODER))
        )
    with pytest.raises(ValueError, match="some of its modules: ") as error:
        Aligner(model, PVLAConfig(video=Stream("nothing"), language=Stream(ENCODER)))
    assert "readapter_" not in str(error.value) and "base_layer" not in str(error.value)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (
            Stream(ENCODER, mask=lambda batch: batch["attention_mask"][:, 1:]),
            r": the mask function's result has shape",
        ),
        (Stream(ENCODER, mask="video_mask"), "the batch has no mask 'video_mask'"),
        (Stream(ENCODER, mask="attention_mask", tokens=slice(0, 2)), "has shape .* set Stream.tokens"),
        (Stream(ENCODER, output=lambda output: output.mean(1)), "needs states of shape"),
    ],
)
def test_a_batch_that_does_not_fit_the_streams_says_why(stream, message):
    model, inputs = tiny_bart(), batch()
    aligner = Aligner(model, PVLAConfig(video=stream, language=Stream(ENCODER)))
    with pytest.raises(ValueError, match=message), aligner.record() as recording:
        model(**inputs)
        aligner.blocks(recording, inputs)


def test_a_config_names_both_streams_or_neither():
    with pytest.raises(ValueError, match="both streams"):
        PVLAConfig(video=Stream(ENCODER))
    with pytest.raises(ValueError, match="neither 'all'"):
        PVLAConfig(blocks="some")


def test_states_without_any_gradient_are_an_error():
    model, inputs = tiny_bart(), batch()
    model.requires_grad_(False)
    aligner = Aligner(model, SLICED)
    with aligner.record() as recording:
        model(**inputs)
    with pytest.raises(RuntimeError, match="has a gradient"):
        aligner.distance(recording, inputs)


def test_states_captured_inside_a_reentrant_checkpoint_are_an_error():
    model, inputs = tiny_bart(), batch()
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inside = Stream(r"model\.encoder\.layers\.\d+\.fc2")
    aligner = Aligner(model, PVLAConfig(video=inside, language=inside))
    with aligner.record(), pytest.raises(RuntimeError, match="reentrant"):
        model(**inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_give_the_plain_gradients(reentrant):
    inputs, gradients = batch(), []
    for checkpointing in (False, True):
        model = tiny_bart().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        aligner = Aligner(model, SLICED)
        # Until 5.22 transformers ran a block's hooks inside its checkpoint, where a reentrant one has no gradients.
        if checkpointing and reentrant and "__call__" in vars(GradientCheckpointingLayer):
            with aligner.record(), pytest.raises(RuntimeError, match="use_reentrant': False"):
                model(**inputs)
            return
        with aligner.record() as recording:
            outputs = model(**inputs)
        (outputs.loss + aligner.loss(recording, inputs, outputs)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("distance", ["partial_ot", "avg_cosine"])
def test_masks_that_are_to_be_added_to_scores_are_refused(distance):
    video, language = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    additive = torch.zeros(2, 5)
    additive[0, 3:] = -torch.inf
    with pytest.raises(ValueError, match=r"^the video mask has negative or NaN entries"):
        PVLALoss(distance=distance)(video, language, additive)
    with pytest.raises(ValueError, match=r"^the language mask has negative or NaN"):
        PVLALoss(distance=distance)(video, language, None, torch.full((2, 4), torch.nan))
