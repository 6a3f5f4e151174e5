"""The alignment under copies, LayerDrop, shared blocks, searches and meaningless settings."""

import copy
import functools
import gc
import io
import json
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AlbertConfig, AlbertModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_read import Aligner, PVLAConfig, PVLALoss, PVLALossMixin, READConfig, Stream
from peft_read.alignment import last_whole_checkpoint
from peft_read.alignment.checkpoints import SEAL
from peft_read.models import VGBartConfig, VGBartForConditionalGeneration

SIZES = {
    "vocab_size": 30, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "visual_feature_dim": 6,
    "max_position_embeddings": 32, "dropout": 0.0,
}  # fmt: skip


def summariser(**changes):
    base = VGBartForConditionalGeneration(VGBartConfig(**{**SIZES, **changes}))
    return get_peft_model(base, READConfig(task_type="SEQ_2_SEQ_LM"))


def items(count=4):
    generator = torch.Generator().manual_seed(0)

    def words(length):
        return torch.randint(3, 30, (length,), generator=generator)

    return [
        {
            "input_ids": words(8), "attention_mask": torch.ones(8, dtype=torch.long), "labels": words(4),
            "video_features": torch.randn(5, 6, generator=generator), "video_mask": torch.ones(5, dtype=torch.long),
        }
        for _ in range(count)
    ]  # fmt: skip


def batch():
    rows = items()
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class AlignedTrainer(PVLALossMixin, Seq2SeqTrainer): ...


def trainer(folder, model=None, **arguments):
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False, "report_to": "none", "per_device_train_batch_size": 2}
    given = {"model": model} if isinstance(model, nn.Module) else {"model_init": lambda: summariser()}
    args = Seq2SeqTrainingArguments(str(folder), **{**settings, **arguments})
    return AlignedTrainer(**given, args=args, train_dataset=items(), pvla_config=PVLAConfig(weight=0.1))


def log_of(run):
    names = ("loss", "task_loss", "pvla_loss", "pvla_mass")
    return [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry]


def test_model_init_aligns_the_model_that_is_trained(tmp_path):
    run = trainer(tmp_path)
    first = run.model
    run.train()
    assert run.model is not first and run.model.peft_config["default"].pvla["mass"] == 0.5
    rows = log_of(run)
    assert len(rows) == 2 and all(row[0] == pytest.approx(row[1] + 0.1 * row[2], rel=1e-5) for row in rows)
    run.train()  # a second model: the counts of the first training are forgotten
    assert log_of(run) == rows


def test_an_aborted_try_leaves_no_trace_in_the_log(tmp_path):
    torch.manual_seed(0)
    plain = trainer(tmp_path, summariser(), per_device_train_batch_size=1)
    plain.train()
    torch.manual_seed(0)
    model = summariser()
    inner, calls = model.get_base_model(), []
    forward = inner.forward

    @functools.wraps(forward)
    def out_of_memory(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        outputs = forward(*args, **kwargs)
        if calls[-1] > 1 and len(calls) == 2:  # the second micro-batch: sums of the first are there already
            raise RuntimeError("CUDA out of memory.")
        return outputs

    inner.forward = out_of_memory
    actual = trainer(tmp_path, model, per_device_train_batch_size=2, auto_find_batch_size=True, logging_steps=2,
                    gradient_accumulation_steps=2)  # fmt: skip
    actual.train()
    assert calls[:2] == [2, 2] and calls[2] == 1
    (row,) = log_of(actual)
    assert row[0] == pytest.approx(row[1] + 0.1 * row[2], rel=1e-4)
    assert row[3] == pytest.approx(0.5, abs=1e-3)


def test_the_alignment_follows_a_replaced_model(tmp_path):
    run = trainer(tmp_path, summariser())
    run.model = run.model_wrapped = copy.deepcopy(run.model)
    run.train()
    assert len(log_of(run)) == 2


def test_a_copy_inside_a_recording_is_not_recorded():
    model = summariser()
    aligner, teacher = Aligner(model, PVLAConfig()), copy.deepcopy(model)
    with aligner.record() as recording:
        outputs = model(**batch())
        teacher(**batch())
    assert aligner.loss(recording, batch(), outputs) > 0
    with aligner.record() as recording:
        teacher(**batch())
    assert not recording.states
    assert aligner.attach(teacher) and not aligner.attach(teacher)
    with aligner.record() as recording:
        outputs = teacher(**batch())
    assert aligner.loss(recording, batch(), outputs) > 0


def test_many_owners_on_one_model_and_none_is_left():
    model = summariser()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    for _ in range(30):
        aligner = Aligner(model, PVLAConfig())
        with aligner.record() as recording:
            outputs = model(**batch())
        aligner.loss(recording, batch(), outputs)
        del aligner, recording
    gc.collect()
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_two_aligners_on_one_model_do_not_meet():
    model = summariser()
    first, second = Aligner(model, PVLAConfig()), Aligner(model, PVLAConfig(blocks=[0]))
    with first.record() as outer:
        model(**batch())
        with second.record() as inner:
            model(**batch())
    assert len(first.blocks(outer, batch())) == 2 and len(second.blocks(inner, batch())) == 1


def test_a_model_with_functions_in_its_streams_can_be_pickled():
    model = summariser()
    layers = r"model\.encoder\.layers\.\d+"
    language = Stream(layers, tokens=slice(5, None), mask=lambda batch: batch["attention_mask"][:, 5:])
    aligner = Aligner(model, PVLAConfig(video=Stream(layers, tokens=slice(0, 5)), language=language))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with aligner.record() as recording:
        model(**batch())
        loaded(**batch())
    assert len(aligner.blocks(recording, batch())) == 2


def test_dropped_blocks_are_left_out_of_the_mean():
    torch.manual_seed(0)
    model = summariser(encoder_layers=4, encoder_layerdrop=0.5).train()
    aligner, seen = Aligner(model, PVLAConfig()), set()
    for _ in range(20):
        with aligner.record() as recording:
            outputs = model(**batch())
        result = aligner.distance(recording, batch(), outputs)
        seen.add(len(result.distance))
        assert torch.isfinite(result.mean())
        expected = [PVLALoss()(block.video, block.language) for block in aligner.blocks(recording, batch())]
        if expected:
            assert torch.isclose(result.mean(), torch.stack(expected).mean(), rtol=1e-4)
        else:
            assert result.mean() == 0 and result.over_blocks()[1].shape == (4,)
        (outputs.loss + 0.1 * result.mean()).backward()
    assert len(seen) >= 3
    model.eval()
    with aligner.record() as recording:
        model(**batch())
    assert len(aligner.blocks(recording, batch())) == 4


def test_layerdrop_trains_through_the_trainer(tmp_path):
    torch.manual_seed(0)
    run = trainer(tmp_path, summariser(encoder_layerdrop=0.9), max_steps=6)
    run.train()
    rows = log_of(run)
    assert len(rows) == 6 and all(np.isfinite(row).all() for row in rows)
    assert any(row[3] == 0 for row in rows) and any(row[3] > 0 for row in rows)


class EarlyExit(nn.Module):
    """Blocks of which the last ones run only where asked."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.other = nn.Linear(4, 4)

    def forward(self, x, depth=3):
        for layer in self.layers[:depth]:
            x = layer(x)
        return x


def test_early_exit_leaves_blocks_out_and_a_module_that_never_ran_is_named():
    model, x = EarlyExit(), torch.randn(2, 6, 4)
    streams = {"tokens": slice(0, 3)}, {"tokens": slice(3, None)}
    aligner = Aligner(model, PVLAConfig(*(Stream(r"layers\.\d", **side) for side in streams)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for depth in (3, 1):
            with aligner.record() as recording:
                model(x, depth)
            assert len(aligner.blocks(recording, {"x": x})) == depth
    aligner = Aligner(model, PVLAConfig(*(Stream(["layers.0", "other"], **side) for side in streams)))
    with aligner.record() as recording:
        model(x)
    with pytest.warns(UserWarning, match="'other' did not run, its block is left out"):
        assert len(aligner.blocks(recording, {})) == 1
    aligner = Aligner(model, PVLAConfig(*(Stream(["other"], **side) for side in streams)))
    with aligner.record() as recording:
        model(x)
    with pytest.raises(RuntimeError, match="'other' did not run"):
        aligner.blocks(recording, {})


def test_a_shared_block_counts_once_per_run():
    config = AlbertConfig(
        vocab_size=30, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    model, ids = AlbertModel(config), torch.randint(3, 30, (2, 6))
    shared = r"encoder\.albert_layer_groups\.0\.albert_layers\.0"
    sides = {"video": Stream(shared, tokens=slice(0, 2)), "language": Stream(shared, tokens=slice(2, None))}
    aligner = Aligner(model, PVLAConfig(**sides))
    with aligner.record() as recording:
        outputs = model(ids, output_hidden_states=True)
    hidden = outputs.hidden_states[1:]
    blocks = aligner.blocks(recording, {"ids": ids})
    assert len(blocks) == len(hidden) == 3
    for block, states in zip(blocks, hidden, strict=True):
        assert torch.equal(block.video, states[:, :2])
    with aligner.record(), pytest.raises(RuntimeError, match="ran twice"):
        model(ids)
        model(ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": float("inf")}, "weight=inf is not finite"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": "0.1"}, "weight='0.1' is not a number"),
        ({"weight": True}, "weight=True"),
        ({"weight": -1}, "must not be negative"),
        ({"mass": torch.ones(2)}, "is not a number"),
        ({"mass": np.nan}, "mass=nan"),
        ({"reg": float("inf")}, "reg=inf"),
        ({"distance": ["partial_ot"]}, "is not one of"),
        ({"method": "sinkhorn"}, "is not one of"),
        ({"blocks": []}, "at least one block"),
        ({"blocks": [0, 0]}, "each block once"),
        ({"blocks": [True]}, r"blocks\[0\]=True"),
        ({"blocks": 3}, "not a sequence of integers"),
        ({"video": "layers", "language": "layers"}, "video='layers' is not a Stream"),
        ({"extractor": "hidden"}, "is not a function"),
    ],
)
def test_invalid_alignment_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PVLAConfig(**settings)


def test_settings_are_converted_to_plain_numbers():
    config = PVLAConfig(weight=torch.tensor(0.25), mass=np.float32(0.5), reg=np.float64(0.1), blocks=np.arange(2))
    assert json.loads(json.dumps(config.record())) == {
        "weight": 0.25, "mass": 0.5, "reg": 0.1, "distance": "partial_ot", "blocks": [0, 1]
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"progress 0\.5: weight=nan"):
        PVLAConfig(weight=lambda progress: float("nan")).weight_at(0.5)
    with pytest.raises(ValueError, match=r"progress 1: mass=2\.0"):
        PVLAConfig(mass=lambda progress: 2).mass_at(1.0)
    with pytest.raises(ValueError, match="must be a PVLAConfig"):
        Aligner(EarlyExit(), {"weight": 0.1})
    with pytest.raises(ValueError, match="pvla_config must be a PVLAConfig"):
        AlignedTrainer(model=EarlyExit(), pvla_config={"weight": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": "("}, "not a regular expression"),
        ({"modules": []}, "names no module"),
        ({"modules": [3]}, "contains 3"),
        ({"modules": 3}, "not a list of names"),
        ({"tokens": 3}, "tokens=3"),
        ({"mask": 3}, "mask=3"),
        ({"invert_mask": "no"}, "invert_mask='no'"),
        ({"output": 1.5}, "output=1.5"),
        ({"input": 1}, "input=1"),
    ],
)
def test_invalid_streams_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Stream(**{"modules": "layers", **settings})


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"tokens": slice(9, None)}, r"'layers.0': tokens slice\(9, None, None\) select \(2, 0, 4\)"),
        ({"tokens": lambda batch, length: 0}, r"tokens 0 select"),
        ({"tokens": lambda batch, length: [0, 99]}, "cannot be taken from 6 tokens"),
        ({"mask": "additive"}, "not a mask to be added to attention scores"),
        ({"mask": lambda batch: "words"}, "a mask must be a tensor, got str"),
        ({"output": lambda output: None}, "needs states of shape"),
    ],
)
def test_a_selection_that_selects_nothing_is_named(stream, message):
    model, x = EarlyExit(), torch.randn(2, 6, 4)
    inputs = {"x": x, "additive": torch.tensor([[0.0] * 4 + [-torch.inf] * 2] * 2)}
    aligner = Aligner(model, PVLAConfig(video=Stream(["layers.0"], **stream), language=Stream(["layers.1"])))
    with pytest.raises(ValueError, match=message), aligner.record() as recording:
        model(x)
        aligner.blocks(recording, inputs)


def test_the_loss_refuses_invalid_masks_and_states():
    video, language = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    additive = torch.zeros(2, 5).masked_fill(torch.arange(5) > 2, -torch.inf)
    for distance in ("partial_ot", "avg_cosine"):
        loss = PVLALoss(distance=distance)
        with pytest.raises(ValueError, match="not a mask to be added"):
            loss(video, language, additive)
        with pytest.raises(ValueError, match=r"floating-point tensor, got torch\.int64"):
            loss(video.long(), language)
        with pytest.raises(ValueError, match="hold no token at all"):
            loss(video[:, :0], language)
        with pytest.raises(ValueError, match="NaN"):
            loss(video.clone().index_fill_(1, torch.tensor([0]), float("nan")), language)
        padded = video.clone().index_fill_(1, torch.tensor([0]), float("nan"))
        mask = (torch.arange(5) > 0).expand(2, 5)
        assert torch.isclose(loss(padded, language, mask), loss(video[:, 1:], language), rtol=1e-4)


def test_a_batch_of_padding_only_is_reported_once():
    model, x = EarlyExit(), torch.randn(2, 6, 4)
    nothing = Stream(r"layers\.\d", mask=lambda batch: torch.zeros(2, 6))
    aligner = Aligner(model, PVLAConfig(video=nothing, language=nothing))
    with aligner.record() as recording:
        model(x)
    with pytest.warns(UserWarning, match="nothing to align"):
        assert aligner.loss(recording, {}) == 0


@pytest.mark.parametrize("damage", ["zeros", "cut", "gone", "state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    run = trainer(tmp_path, summariser(), save_strategy="steps", save_steps=1)
    run.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    last = tmp_path / "checkpoint-2"
    weights = last / "adapter_model.safetensors"
    if damage == "zeros":
        half = weights.stat().st_size // 2
        weights.write_bytes(weights.read_bytes()[:half] + bytes(weights.stat().st_size - half))
    elif damage == "cut":
        optimizer = last / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:100])
    elif damage == "gone":
        (last / "scheduler.pt").unlink()
    else:
        (last / "trainer_state.json").write_text("{")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    if damage == "cut":  # without a seal the file itself must tell
        (last / SEAL).unlink()
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        run = trainer(tmp_path, summariser(), save_strategy="steps", save_steps=1)
        run.train(resume_from_checkpoint=True)
        assert last_whole_checkpoint(tmp_path) == str(last)
