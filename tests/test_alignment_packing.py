"""Rows that hold several packed samples are not aligned."""

import pytest
import torch
from test_alignment_trainer import BLOCKS, one_step, tiny_model
from transformers import BertConfig, BertModel, DataCollatorWithFlattening

from peft_read import Aligner, PVLAConfig, Stream
from peft_read.adapter.packing import segments_told
from peft_read.alignment import aligner as aligner_module
from peft_read.alignment.packing import packed_rows

LENGTHS = (5, 3, 4)
WIDTH = sum(LENGTHS)
IDS = torch.arange(4, 4 + WIDTH)[None]
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
RESTARTING = torch.cat([torch.arange(length) for length in LENGTHS])[None]
TRIANGLE = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
DIAGONAL = TRIANGLE & (NUMBERS[0][:, None] == NUMBERS[0])
PADDED = TRIANGLE & (torch.arange(WIDTH) < WIDTH - 2) & (torch.arange(WIDTH) < WIDTH - 2)[:, None]


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


PACKED = {
    "restarting positions": {"position_ids": RESTARTING},
    "positions of rotary axes": {"position_ids": torch.cat([RESTARTING[None], torch.zeros(3, 1, WIDTH).long()])},
    "numbers of sequences": {"seq_idx": NUMBERS},
    "numbers of segments": {"segment_ids": NUMBERS},
    "cumulative lengths": {"cu_seq_lens_q": torch.tensor([0, 5, 8, 12])},
    "cumulative lengths by another name": {"cu_seqlens": torch.tensor([0, 5, 8, 12])},
    "block-diagonal mask": {"attention_mask": DIAGONAL[None, None]},
    "additive mask": {"attention_mask": additive(DIAGONAL)[None, None]},
    "mask of numbers": {"attention_mask": DIAGONAL[None, None].long()},
    "masks by kind": {"attention_mask": {"sliding_attention": None, "full_attention": DIAGONAL[None, None]}},
}
SINGLE = {
    "nothing": {},
    "positions": {"position_ids": torch.arange(WIDTH)[None]},
    "positions from 2 on": {"position_ids": torch.arange(WIDTH)[None] + 2},
    "axes alone": {"position_ids": torch.zeros(3, 1, WIDTH).long()},
    "positions beside a mask": {"position_ids": RESTARTING, "attention_mask": torch.ones(1, WIDTH)},
    "one number": {"seq_idx": torch.zeros(1, WIDTH).long()},
    "one length": {"cu_seq_lens_q": torch.tensor([0, WIDTH])},
    "causal mask": {"attention_mask": TRIANGLE[None, None]},
    "padded mask": {"attention_mask": PADDED[None, None]},
    "additive causal mask": {"attention_mask": additive(TRIANGLE)[None, None]},
    "cross-attention": {"attention_mask": torch.ones(1, 1, WIDTH, 7)},
    "padding": {"attention_mask": torch.ones(1, WIDTH)},
}


@pytest.mark.parametrize("name", [*PACKED, *SINGLE])
def test_rows_are_packed_where_the_adapter_splits_them(name):
    given = {**PACKED, **SINGLE}[name]
    told = packed_rows({"input_ids": IDS, **given})
    packed = told is not None and bool(told[1])
    segments = segments_told(torch.nn.Module(), given, 1, WIDTH).segment_ids
    assert packed == (segments is not None and len(segments.unique()) > 1)
    assert packed == (name in PACKED)


def streams():
    layers = BLOCKS["llama"]
    return PVLAConfig(video=Stream(layers, tokens=slice(0, 4)), language=Stream(layers, tokens=slice(4, None)))


def test_positions_that_restart_in_an_encoder_are_those_of_one_sample():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
    layers = r"encoder\.layer\.\d+"
    config = PVLAConfig(video=Stream(layers, tokens=slice(0, 4)), language=Stream(layers, tokens=slice(4, None)))
    aligner, batch = Aligner(model, config), {"input_ids": IDS, **PACKED["restarting positions"]}
    with aligner.record() as recording:
        model(**batch)
    assert aligner.distance(recording, batch).distance.isfinite().all()


@pytest.mark.parametrize("name", ["restarting positions", "block-diagonal mask"])
def test_an_aligner_refuses_packed_rows(name):
    model = tiny_model("llama")
    aligner, batch = Aligner(model, streams()), {"input_ids": IDS, **PACKED[name]}
    with aligner.record() as recording:
        outputs = model(**batch)
    with pytest.raises(ValueError, match=r"several packed samples .* DataCollatorWithFlattening"):
        aligner.loss(recording, batch, outputs)


@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}])
def test_training_on_flattened_rows_is_refused(options, tmp_path):
    collator = DataCollatorWithFlattening(**options)
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    with pytest.raises(ValueError, match=r"several packed samples .*the frames of one with the words of another"):
        one_step(
            "llama", tmp_path, batch_size=2, accumulation=2, data=rows, data_collator=collator, config=streams(),
            remove_unused_columns=False,
        )  # fmt: skip


def test_an_extractor_that_takes_packed_rows_apart_may_do_so():
    states = torch.randn(1, WIDTH, 8, requires_grad=True)

    def taken_apart(batch, outputs):
        return [(torch.cat([states[:, 0:2], states[:, 5:7]]), torch.cat([states[:, 2:4], states[:, 7:9]]), None, None)]

    aligner = Aligner(tiny_model("llama"), PVLAConfig(extractor=taken_apart))
    batch = {"input_ids": IDS, "position_ids": RESTARTING}
    with aligner.record() as recording:
        pass
    assert aligner.distance(recording, batch).distance.shape == (1, 2)


def test_on_a_device_packed_rows_are_reported_when_it_is_read_anyway(monkeypatch):
    """There nobody waits for values, once the first batch has been aligned."""
    monkeypatch.setattr(aligner_module, "_is_on_a_device", lambda tensor: True)
    model, whole = tiny_model("llama"), {"input_ids": IDS, "position_ids": torch.arange(WIDTH)[None]}
    packed = {**whole, "position_ids": RESTARTING}

    def align(aligner, batch):
        with aligner.record() as recording:
            outputs = model(**batch)
        aligner.loss(recording, batch, outputs)

    aligner = Aligner(model, streams())
    for batch in (whole, packed, whole):
        align(aligner, batch)
    with pytest.raises(ValueError, match="several packed samples"):
        aligner.refuse_packed()
    aligner.refuse_packed()  # said once
    with pytest.raises(ValueError, match="several packed samples"):
        align(Aligner(model, streams()), packed)


def test_the_mixin_reports_them_with_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(aligner_module, "_is_on_a_device", lambda tensor: True)
    rows = [{"input_ids": IDS[0], "labels": IDS[0], "position_ids": torch.arange(WIDTH)} for _ in range(4)]
    rows[2]["position_ids"] = RESTARTING[0]
    with pytest.raises(ValueError, match="several packed samples"):
        one_step(
            "llama", tmp_path, batch_size=1, accumulation=2, data=rows, config=streams(), max_steps=2, logging_steps=2,
            train_sampling_strategy="sequential",
        )  # fmt: skip
