"""PVLALossMixin: exact scaling, logging, evaluation, and what it refuses."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
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
        video=Stream(layers, tokens=slice(0, 4)),
        language=Stream(layers, tokens=slice(4, None), mask=lambda batch: batch["attention_mask"][:, 4:]),
        **{"weight": WEIGHT, **changes},
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


def one_step(family, folder, *, batch_size, accumulation, data=None, trainer_class=AlignedTrainer, **arguments):
    """Gradients of one SGD step, as the difference of the parameters."""
    model = tiny_model(family)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()]).double()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data or items(family),
        data_collator=collate,
        pvla_config=pvla_config(family),
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
