"""PVLALossMixin: exact scaling, logging, evaluation, and what it refuses."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_read import PVLAConfig, PVLALoss, PVLALossMixin, READConfig, Stream
from peft_read.alignment import aligner

SIZES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BLOCKS = {
    "bart": r"model\.encoder\.layers\.\d+",
    "t5": r"encoder\.block\.\d+",
    "gpt2": r"transformer\.h\.\d+",
    "llama": r"model\.layers\.\d+",
}
WEIGHT = 0.5


class AlignedTrainer(PVLALossMixin, Trainer):
    pass


class AlignedSeq2SeqTrainer(PVLALossMixin, Seq2SeqTrainer):
    pass


def tiny_model(family):
    torch.manual_seed(0)
    if family == "bart":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForConditionalGeneration(
            BartConfig(vocab_size=40, max_position_embeddings=32, dropout=0.0, **SIZES, **heads)
        )
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=40,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )
    if family == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **dropouts))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes))


def pvla_config(family, **changes):
    layers = BLOCKS[family]
    return PVLAConfig(
        language=Stream(layers, tokens=slice(4, None), mask=lambda batch: batch["attention_mask"][:, 4:]),
        **{"video": Stream(layers, tokens=slice(0, 4)), "weight": WEIGHT, **changes},
    )


def items(family, count=16):
    """Items with very unequal numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.randint(4, 40, (12,), generator=generator)
        mask = torch.ones(12, dtype=torch.long)
        if family in ("bart", "t5"):
            mask[12 - index % 4 :] = 0
            labels = torch.randint(4, 40, (8,), generator=generator)
            labels[1 + index % 8 :] = -100
        else:
            labels = ids.clone()
            labels[: (index * 5) % 11] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def one_step(
    family,
    folder,
    *,
    batch_size,
    accumulation,
    data=None,
    model=None,
    data_collator=collate,
    config=None,
    trainer_class=AlignedTrainer,
    **arguments,
):
    """Gradients of one SGD step, as the difference of the parameters."""
    model = tiny_model(family) if model is None else model
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()]).double()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 1, "learning_rate": 1.0, "logging_steps": 1, **arguments},
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data or items(family),
        data_collator=data_collator,
        pvla_config=config or pvla_config(family),
    )
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double()
    return before - after, trainer.state.log_history


def reference_gradient(family, rows):
    """The definition: cross-entropy summed over all labels / their number, plus weight x mean distance."""
    model, batch = tiny_model(family), collate(rows)
    outputs = model(**batch, output_hidden_states=True)
    logits, labels = outputs.logits, batch["labels"]
    count = (labels != -100).sum()
    if family in ("gpt2", "llama"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if family == "llama":  # Trainer leaves a row's first label out of its count for Llama, and counts it for GPT-2
        count = (labels != -100).sum()
    task = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
    captured = []
    handles = [
        module.register_forward_hook(lambda m, args, out: captured.append(out[0] if isinstance(out, tuple) else out))
        for name, module in model.named_modules()
        if re.fullmatch(BLOCKS[family], name)
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    masks = batch["attention_mask"][:, 4:]
    pvla = PVLALoss()([c[:, :4] for c in captured], [c[:, 4:] for c in captured], None, masks)
    (task + WEIGHT * pvla).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in gradients]).double(), float(task.detach()), float(pvla.detach())


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["bart", "t5", "gpt2", "llama"])
def test_accumulated_gradients_are_those_of_one_batch(family, tmp_path):
    expected, task, pvla = reference_gradient(family, items(family))
    for accumulation in (1, 2, 4, 8):
        actual, log = one_step(family, tmp_path, batch_size=16 // accumulation, accumulation=accumulation)
        assert relative_error(actual, expected) < 1e-5, accumulation
        assert log[0]["task_loss"] == pytest.approx(task, rel=1e-4)
        assert log[0]["pvla_loss"] == pytest.approx(pvla, rel=1e-4)
        assert log[0]["loss"] == pytest.approx(task + WEIGHT * pvla, rel=1e-4)
        assert 0 < log[0]["pvla_mass"] <= 0.5 + 1e-3


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_an_unequal_last_micro_batch_counts_by_its_examples(family, tmp_path):
    rows = items(family, count=11)  # micro-batches of 4, 4 and 3
    expected, _, _ = reference_gradient(family, rows)
    actual, _ = one_step(family, tmp_path, batch_size=4, accumulation=3, data=rows)
    assert relative_error(actual, expected) < 1e-5


def test_the_check_sees_a_wrong_scale(tmp_path, monkeypatch):
    expected, _, _ = reference_gradient("bart", items("bart"))
    monkeypatch.setattr(AlignedTrainer, "_share_of_step", lambda self, examples, items_in_batch: 1.0)
    actual, _ = one_step("bart", tmp_path, batch_size=4, accumulation=4)
    assert relative_error(actual, expected) > 1e-2


def test_label_smoothing_is_exact_too(tmp_path):
    runs = [
        one_step("gpt2", tmp_path, batch_size=16 // steps, accumulation=steps, label_smoothing_factor=0.1)[0]
        for steps in (1, 4)
    ]
    assert relative_error(runs[1], runs[0]) < 1e-5


def test_a_micro_batch_without_labels_contributes_only_its_alignment(tmp_path):
    rows = items("bart")
    for row in rows[:8]:
        row["labels"][:] = -100
    actual, log = one_step(
        "bart", tmp_path, batch_size=4, accumulation=4, data=rows, train_sampling_strategy="sequential"
    )
    expected, task, _ = reference_gradient("bart", rows)
    assert relative_error(actual, expected) < 1e-5
    assert log[0]["task_loss"] == pytest.approx(task, rel=1e-4)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_loss_that_was_rounded_to_bfloat16_is_divided_too(family, tmp_path):
    """The whole model in bfloat16, as its checkpoint may be: its loss has 8 bits and is nothing to the last digit."""
    _, task, _ = reference_gradient(family, items(family))
    for rows in (items(family), items(family)[::-1]):
        _, log = one_step(
            family, tmp_path, batch_size=2, accumulation=8, data=rows, model=tiny_model(family).bfloat16(),
            train_sampling_strategy="sequential",
        )  # fmt: skip
        assert log[0]["task_loss"] == pytest.approx(task, rel=2e-2)


def test_a_micro_batch_with_nearly_all_tokens_settles_nothing(tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for tokens in (1200, 1):
        labels = torch.full((1200,), -100)
        labels[:tokens] = torch.randint(4, 40, (tokens,), generator=generator)
        ids = torch.randint(4, 40, (12,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(12, dtype=torch.long), "labels": labels})
    _, task, _ = reference_gradient("t5", rows)
    _, log = one_step("t5", tmp_path, batch_size=1, accumulation=2, data=rows, train_sampling_strategy="sequential")
    assert log[0]["task_loss"] == pytest.approx(task, rel=1e-4)


class PenalisedBart(BartForConditionalGeneration):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1.0
        return output


def test_a_loss_that_nobody_can_divide_is_refused_with_the_way_out(tmp_path):
    def model():
        model = tiny_model("bart")
        model.__class__ = PenalisedBart
        return model

    with pytest.raises(ValueError, match=r"neither the mean cross-entropy .* set accepts_loss_kwargs = False"):
        one_step("bart", tmp_path, batch_size=4, accumulation=4, model=model(), remove_unused_columns=False)
    penalised = model()
    penalised.accepts_loss_kwargs = False
    _, log = one_step("bart", tmp_path, batch_size=4, accumulation=4, model=penalised, remove_unused_columns=False)
    _, task, _ = reference_gradient("bart", items("bart"))
    assert log[0]["task_loss"] == pytest.approx(task + 1, rel=2e-2)  # a mean of unequal means


class VideoLlama(LlamaForCausalLM):
    """Takes patches of all its images in one row, as Qwen-VL does, and its words under two sets of names."""

    def forward(self, patches=None, ids=None, mask=None, targets=None, **kwargs):
        named = {"input_ids": ids, "attention_mask": mask, "labels": targets}
        return super().forward(**{**kwargs, **{name: value for name, value in named.items() if value is not None}})


def video_llama():
    model = tiny_model("llama")
    model.__class__ = VideoLlama
    return model


def test_a_batch_is_counted_by_its_examples_and_not_by_its_first_tensor(tmp_path):
    _, _, pvla = reference_gradient("llama", items("llama"))
    _, log = one_step(
        "llama", tmp_path, batch_size=4, accumulation=4, model=video_llama(), remove_unused_columns=False,
        data_collator=lambda rows: {"patches": torch.zeros(100 + len(rows), 3), **collate(rows)},
    )  # fmt: skip
    assert log[0]["pvla_loss"] == pytest.approx(pvla, rel=1e-4)


def test_a_batch_that_cannot_be_counted_is_an_error(tmp_path):
    def unnamed(rows):
        batch = collate(rows)
        words = {"ids": batch["input_ids"], "mask": batch["attention_mask"], "targets": batch["labels"]}
        return {"patches": torch.zeros(100, 3), **words}

    layers = BLOCKS["llama"]
    config = PVLAConfig(video=Stream(layers, tokens=slice(0, 4)), language=Stream(layers, tokens=slice(4, None)))
    with pytest.raises(
        ValueError, match=r"4 examples in a batch whose 'patches' has 100 rows.*under one of input_ids"
    ):
        one_step(
            "llama", tmp_path, batch_size=4, accumulation=4, model=video_llama(), remove_unused_columns=False,
            data_collator=unnamed, config=config,
        )  # fmt: skip


class Endless(IterableDataset):
    """A dataset that does not know its length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_the_end_of_a_dataset_without_length_is_no_step(tmp_path):
    _, _, pvla = reference_gradient("gpt2", items("gpt2"))
    _, log = one_step(
        "gpt2", tmp_path, batch_size=4, accumulation=1, data=Endless(items("gpt2")), max_steps=8, logging_steps=8,
        learning_rate=0.0,
    )  # fmt: skip
    assert log[0]["pvla_loss"] == pytest.approx(pvla, rel=1e-4)  # two passes over the same 16 rows
    assert log[0]["loss"] == pytest.approx(log[0]["task_loss"] + WEIGHT * pvla, rel=1e-4)


def test_predictions_without_labels_come_out_unmeasured(tmp_path):
    model = tiny_model("t5")
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in items("t5", count=3)]
    trainer = seq2seq_trainer(tmp_path, pvla_config("t5"), model, predict_with_generate=True)
    result = trainer.predict(rows, max_length=4)
    assert len(result.predictions) == 3
    assert "test_pvla_loss" not in result.metrics


class TaskTrainer(Trainer):
    not_of_the_model = ("task",)

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, {k: v for k, v in inputs.items() if k != "task"}, *args, **kwargs)


class AlignedTaskTrainer(PVLALossMixin, TaskTrainer):
    pass


class StrictLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class OpenLlama(LlamaForCausalLM):
    def forward(self, **kwargs):
        assert "task" not in kwargs
        return super().forward(**kwargs)


@pytest.mark.parametrize("kind", [StrictLlama, OpenLlama])
def test_the_measuring_pass_gets_what_the_model_takes(kind, tmp_path):
    model = tiny_model("llama")
    model.__class__ = kind
    rows = items("llama")[:4]
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, remove_unused_columns=False, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = AlignedTaskTrainer(
        model, args, pvla_config=pvla_config("llama"),
        data_collator=lambda rows: {**{k: v for k, v in collate(rows).items() if k != "labels"}, "task": "captions"},
    )  # fmt: skip
    _, _, pvla = reference_gradient("llama", rows)
    assert trainer.predict(rows).metrics["test_pvla_loss"] == pytest.approx(pvla, rel=1e-4)


def seq2seq_trainer(folder, config, model=None, **arguments):
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": 2, **arguments},
    )
    rows = items("bart")
    return AlignedSeq2SeqTrainer(
        model=model or tiny_model("bart"),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:10],
        data_collator=collate,
        compute_metrics=(lambda prediction: {}) if arguments.get("predict_with_generate") else None,
        pvla_config=config,
    )


@pytest.mark.parametrize("generate", [False, True])
def test_evaluation_reports_the_alignment_beside_an_untouched_loss(tmp_path, generate):
    plain = seq2seq_trainer(tmp_path, None, predict_with_generate=generate).evaluate()
    aligned = seq2seq_trainer(tmp_path, pvla_config("bart"), predict_with_generate=generate).evaluate()
    assert aligned["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    assert "eval_pvla_loss" not in plain
    _, _, pvla = reference_gradient("bart", items("bart")[:10])
    assert aligned["eval_pvla_loss"] == pytest.approx(pvla, rel=1e-4)


def test_without_a_config_it_is_the_plain_trainer(tmp_path):
    trainer = seq2seq_trainer(tmp_path, None)
    trainer.train()
    assert "pvla_loss" not in trainer.state.log_history[0]


@pytest.mark.parametrize("method", ["read", "lora"])
def test_it_works_with_peft_methods_and_resumes_bit_identically(method, tmp_path):
    def model():
        config = (
            READConfig(r=2, target_modules=["fc2"]) if method == "read" else LoraConfig(r=2, target_modules=["q_proj"])
        )
        return get_peft_model(tiny_model("bart"), config)

    runs, logs = [], []
    card = tmp_path / "whole" / "checkpoint-4" / "README.md"
    for name, resume in (("whole", False), ("cut", True)):
        torch.manual_seed(5)
        trainer = seq2seq_trainer(
            tmp_path / name, pvla_config("bart"), model(), save_strategy="steps", save_steps=2, learning_rate=1e-2
        )
        trainer.train()
        if resume:
            torch.manual_seed(6)
            trainer = seq2seq_trainer(
                tmp_path / name, pvla_config("bart"), model(), save_strategy="steps", save_steps=2, learning_rate=1e-2
            )
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        runs.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        state = json.loads((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_text())
        logs.append(state["log_history"][-1])
    assert torch.equal(*runs)
    for name in ("loss", "task_loss", "pvla_loss", "pvla_mass"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-6), name
    if method == "read":
        assert "partial_ot" in card.read_text()


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Seq2SeqTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataParallel"):
        seq2seq_trainer(tmp_path, pvla_config("bart"))


def test_nan_on_a_device_ends_training_at_the_next_log(tmp_path, monkeypatch):
    measure = aligner.alignment_distance

    def as_on_a_device(*arguments, **options):
        """There nobody looks at values before solving: a NaN comes back as a NaN."""
        result = measure(*arguments, **options)
        distance = result.distance.clone()
        distance[1, 0] = torch.nan
        return result._replace(distance=distance)

    monkeypatch.setattr(aligner, "alignment_distance", as_on_a_device)
    with pytest.raises(
        FloatingPointError, match=r"alignment of block 1 \(.*<->.*\) was NaN or infinite for 1 examples"
    ):
        one_step("gpt2", tmp_path, batch_size=16, accumulation=1)
