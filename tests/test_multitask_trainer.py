"""MultitaskMixin: whose gradients come out, what is logged and evaluated, how a run goes on, and what is refused."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_data_how2 import word_tokenizer
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_read import PVLAConfig, PVLALossMixin, READConfig, Stream
from peft_read.alignment import Aligner
from peft_read.data import MultitaskDataset, VLCollator, load_nlvr2, load_vqa
from peft_read.models import VLBartConfig, VLBartForConditionalGeneration
from peft_read.tasks import TaskModule, set_task
from peft_read.vl_adapter import MultitaskMixin, task_loss

TASKS = {"vqa": "scored_sample_mean", "nlvr": "sample_mean", "caption": "token_mean"}
SIZES = {"vqa": 8, "nlvr": 4, "caption": 6}


class PlainTrainer(MultitaskMixin, Trainer):
    pass


class GeneratingTrainer(MultitaskMixin, Seq2SeqTrainer):
    pass


class AlignedTrainer(PVLALossMixin, MultitaskMixin, Seq2SeqTrainer):
    pass


class Scale(nn.Module, TaskModule):
    """A vector for each task, times which the states are taken."""

    def __init__(self, width, tasks):
        super().__init__()
        self.task_names = tuple(tasks)
        self.weights = nn.ParameterDict({task: torch.linspace(0.5, 1.5 + i, width) for i, task in enumerate(tasks)})

    def forward(self, states):
        return states * self.weights[self.task]


def tiny_model(tasks=tuple(TASKS), dropout=0.0):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, dropout_rate=dropout,
            decoder_start_token_id=0, initializer_factor=0.5,
        )
    )  # fmt: skip
    if tasks:
        model.encoder.final_layer_norm = nn.Sequential(model.encoder.final_layer_norm, Scale(16, tasks))
    return model


def data(**sizes):
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for task, size in (sizes or SIZES).items():
        parts[task] = []
        for index in range(size):
            labels = torch.randint(4, 40, (6,), generator=generator)
            labels[1 + index % 6 :] = -100
            ids = torch.randint(4, 40, (8,), generator=generator)
            parts[task].append({"input_ids": ids, "labels": labels, "scores": torch.tensor(0.3 + 0.1 * (index % 8))})
    return MultitaskDataset(parts)


def collate(rows):
    names = ("input_ids", "labels", "scores")
    batch = {name: torch.stack([row[name] for row in rows]) for name in names}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {**batch, "task": [row["task"] for row in rows]}


def trainer_of(folder, train, trainer_class=PlainTrainer, *, model=None, options=None, evaluation=None, **arguments):
    generates = issubclass(trainer_class, Seq2SeqTrainer)
    defaults = {
        "output_dir": str(folder), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "save_strategy": "no",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = (Seq2SeqTrainingArguments if generates else TrainingArguments)(**{**defaults, **arguments})
    return trainer_class(
        model=model or tiny_model(), args=args, train_dataset=train, eval_dataset=evaluation, data_collator=collate,
        **(options or {}),
    )  # fmt: skip


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()]).double()


def step_of(folder, train, **changes):
    """The gradient of one SGD step, as the difference of the parameters, and the log."""
    trainer = trainer_of(folder, train, **changes)
    before = flat(trainer.model)
    trainer.train()
    return before - flat(trainer.model), trainer.state.log_history


def expected_step(train, *, batches=None):
    """sum_t m_t / M · (loss of all examples of task t), by hand."""
    model = tiny_model().train()
    batches = batches or dict.fromkeys(train.tasks, 1)
    for task, part in train.by_task().items():
        set_task(model, task)
        rows = collate([part[i] for i in range(len(part))])
        outputs = model(**{name: rows[name] for name in ("input_ids", "attention_mask", "labels")})
        loss = task_loss(outputs.logits, rows["labels"], TASKS[task], rows["scores"]).mean
        (loss * batches[task] / sum(batches.values())).backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    ).double()


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("task", list(TASKS))
def test_accumulated_batches_of_one_task_give_the_gradient_of_one_large_batch(tmp_path, task):
    train = data(**{task: 8})
    expected = expected_step(train)
    for size, accumulation in ((8, 1), (2, 4), (3, 3)):
        actual, log = step_of(
            tmp_path, train, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )
        assert relative_error(actual, expected) < 1e-5, (size, accumulation)
        assert log[0][f"{task}_loss"] == pytest.approx(log[0]["loss"], rel=1e-4)


def test_tasks_within_one_step_count_by_their_batches(tmp_path):
    train = data()
    sizes = {"vqa": 4, "nlvr": 2, "caption": 6}  # 2, 2 and 1 batches
    actual, log = step_of(
        tmp_path, train, options={"task_batch_sizes": sizes}, gradient_accumulation_steps=5, num_train_epochs=1
    )
    assert relative_error(actual, expected_step(train, batches={"vqa": 2, "nlvr": 2, "caption": 1})) < 1e-5
    weighted = (2 * log[0]["vqa_loss"] + 2 * log[0]["nlvr_loss"] + log[0]["caption_loss"]) / 5
    assert log[0]["loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_the_alignment_is_added_to_the_task_loss(tmp_path, caplog, task):
    config = PVLAConfig(
        video=Stream(r"encoder\.block\.\d+", tokens=slice(0, 4)),
        language=Stream(r"encoder\.block\.\d+", tokens=slice(4, None)),
        weight=0.5,
    )
    train = data(**{task: 6})
    options = {"pvla_config": config}
    actual, log = step_of(
        tmp_path, train, trainer_class=AlignedTrainer, options=options, per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    model = tiny_model().train()
    set_task(model, task)
    batch = collate([train[i] for i in range(6)])
    aligner = Aligner(model, config)
    with aligner.record() as recording:
        outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    pvla = aligner.distance(recording, batch, outputs).mean()
    (task_loss(outputs.logits, batch["labels"], TASKS[task], batch["scores"]).mean + 0.5 * pvla).backward()
    expected = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    assert relative_error(actual, expected.double()) < 1e-5
    assert log[0]["task_loss"] == pytest.approx(log[0][f"{task}_loss"], rel=1e-4)
    assert log[0]["pvla_loss"] == pytest.approx(float(pvla.detach()), rel=1e-4)
    assert not caplog.records  # the loss is not taken for one of the model's that should be divided otherwise


@pytest.mark.parametrize("generates", [False, True])
def test_tasks_are_evaluated_one_by_one_with_their_own_losses_and_metrics(tmp_path, generates):
    train, model = data(), tiny_model()
    metrics = {task: lambda p, t=task: {f"rows_{t}": len(p.label_ids)} for task in TASKS}
    options = {"task_metrics": metrics, "task_generation": {"vqa": {"max_length": 5}} if generates else None}
    trainer = trainer_of(
        tmp_path, train, GeneratingTrainer, model=model, evaluation=data(), per_device_eval_batch_size=3,
        predict_with_generate=generates, options=options,
    )  # fmt: skip
    result = trainer.evaluate()
    model.eval()
    for task, part in data().by_task().items():
        assert result[f"eval_{task}_rows_{task}"] == SIZES[task]
        batch = collate([part[i] for i in range(len(part))])
        with torch.no_grad(), set_task(model, task):
            logits = model(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels")}).logits
        loss = task_loss(logits, batch["labels"], TASKS[task], batch["scores"]).mean
        assert result[f"eval_{task}_loss"] == pytest.approx(float(loss), rel=1e-4)
    if generates:
        predicted = trainer.predict(data().by_task()["vqa"], max_length=7)
        batch = collate([data()[i] for i in range(3)])
        with set_task(model, "vqa"):
            tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=5)
        assert predicted.predictions[:3, : tokens.shape[1]].tolist() == tokens.tolist()


@pytest.mark.parametrize("stop", [4, 9])
def test_a_resumed_run_ends_with_the_same_weights_and_log(tmp_path, stop):
    def run(folder, steps, resume=None):
        trainer = trainer_of(
            folder, data(), model=tiny_model(dropout=0.3), max_steps=steps, learning_rate=0.05, optim="adamw_torch",
            save_strategy="steps", save_steps=stop, logging_steps=1, seed=3,
            options={"task_batch_sizes": {"vqa": 2, "nlvr": 2, "caption": 2}},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 20)  # epochs of 9 batches
    run(tmp_path / "parts", stop)
    resumed = run(tmp_path / "parts", 20, str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert torch.equal(flat(whole.model), flat(resumed.model))

    def losses(trainer):
        return [{n: v for n, v in e.items() if n.endswith("loss")} for e in trainer.state.log_history if "loss" in e]

    assert losses(resumed) == losses(whole)


def test_batches_without_a_task_or_of_several_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, data())
    rows = [data()[0], data()[9]]
    with pytest.raises(ValueError, match="a batch mixes the tasks 'nlvr', 'vqa': a model serves one at a time"):
        trainer.compute_loss(trainer.model, collate(rows))
    batch = {name: value for name, value in collate(rows).items() if name != "task"}
    with pytest.raises(ValueError, match="a batch must name its task"):
        trainer.compute_loss(trainer.model, batch)
    with pytest.raises(ValueError, match="task 'gqa' is unknown to this model"):
        trainer.compute_loss(trainer.model, {**batch, "task": "gqa"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor would have no effect"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last would have no effect"),
        ({"options": {"task_losses": {"vqa": "mean"}}}, "the kind of a loss must be one of"),
        ({"options": {"task_metrics": {"gqa": len}}}, r"task_metrics names tasks without data: \['gqa'\]"),
        ({"options": {"task_losses": {"GQA": "sample_mean"}}}, r"task_losses names tasks without data: \['GQA'\]"),
        ({"options": {"task_generation": {"vqa": {"num_beams": 2}}}}, "nothing is generated without predict_with_gen"),
        ({"options": {"task_batch_sizes": SIZES}, "auto_find_batch_size": True}, "auto_find_batch_size would have no"),
        ({"options": {"loss_shifts_labels": "no"}}, "loss_shifts_labels must be True, False or None"),
        ({"options": {"compute_loss_func": len}}, "compute_loss_func would have no effect"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, data(), **changes)


def test_data_and_model_must_have_the_same_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"weights for the tasks \['vqa'\], and none for \['nlvr', 'caption'\]"):
        trainer_of(tmp_path, data(), model=tiny_model(("vqa",)))
    with pytest.raises(ValueError, match="no kind of loss for 'kilogram'"):
        trainer_of(tmp_path, data(kilogram=2), model=tiny_model(()))
    with pytest.raises(ValueError, match="train_dataset must be a MultitaskDataset, not list"):
        trainer_of(tmp_path, [1])
    uneven = {"task_sampling": "balanced", "task_batch_sizes": {"vqa": 1, "nlvr": 4, "caption": 6}}
    with pytest.raises(ValueError, match=r"\['nlvr', 'caption'\] have fewer.*n_batches=1, or restart=True"):
        trainer_of(tmp_path, data(), options=uneven).train()
    sampling = {"sampling": "balanced", "restart": True}
    trainer = trainer_of(tmp_path, data(), options={**uneven, "task_sampling": sampling}, max_steps=12)
    assert len(trainer.get_train_dataloader()) == 9
    trainer.train()


def test_a_mixin_whose_loss_would_be_lost_is_refused(tmp_path):
    class Reversed(MultitaskMixin, PVLALossMixin, Trainer):
        pass

    with pytest.raises(ValueError, match=r"class Reversed\(PVLALossMixin, MultitaskMixin, \.\.\.\)"):
        trainer_of(tmp_path, data(), Reversed)


def test_the_two_mixins_share_no_private_name():
    private = [
        {n for n in vars(mixin) if n.startswith("_") and not n.startswith("__")}
        for mixin in (PVLALossMixin, MultitaskMixin)
    ]
    assert not private[0] & private[1] - {"_abc_impl"}


def test_the_sampler_follows_the_epoch_of_a_resumed_run(tmp_path):
    """The Trainer sets no epoch on a sampler that accelerate has wrapped for several processes and skipped ahead."""
    trainer = trainer_of(tmp_path, data())
    trainer.get_train_dataloader()
    for done, epoch in ((0.0, 0), (2.0, 2), (2.7, 2)):
        trainer.state.epoch = done
        trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
        assert trainer._sampler.epoch == epoch


def test_unused_weights_of_other_tasks_are_told_to_ddp(tmp_path):
    assert trainer_of(tmp_path, data()).args.ddp_find_unused_parameters is True
    assert trainer_of(tmp_path, data(), model=tiny_model(())).args.ddp_find_unused_parameters is None
    lora = {"r": 2, "target_modules": ["wo"]}
    per_task = get_peft_model(tiny_model(()), LoraConfig(**lora), adapter_name="vqa")
    per_task.add_adapter("nlvr", LoraConfig(**lora))
    assert trainer_of(tmp_path, data(), model=per_task).args.ddp_find_unused_parameters is True
    checkpointed = tiny_model()
    checkpointed.gradient_checkpointing_enable()  # for which the Trainer would have DDP not look for them
    assert trainer_of(tmp_path, data(), model=checkpointed).accelerator.ddp_handler.find_unused_parameters is True


def test_read_and_alignment_on_vl_bart_from_files_to_predictions(tmp_path):
    """Two images' statements and a question, one task per batch: trained, evaluated by task, and resumed."""
    statement = {"identifier": "dev-0-0-0", "img0": "a", "img1": "b", "sent": "two dogs", "label": 1, "uid": "u0"}
    question = {"question_id": 1, "img_id": "a", "sent": "what is it", "label": {"dog": 1.0, "cat": 0.3}}
    files = {"nlvr": [{**statement, "uid": f"u{i}", "label": i % 2} for i in range(4)]}
    files["vqa"] = [{**question, "question_id": i} for i in range(6)]
    for task, records in files.items():
        (tmp_path / f"{task}.json").write_text(json.dumps(records))
    parts = {"vqa": load_vqa(tmp_path / "vqa.json"), "nlvr": load_nlvr2(tmp_path / "nlvr.json")}
    generator = np.random.default_rng(0)
    features = {image: generator.normal(size=(3, 4)).astype(np.float32) for image in "ab"}

    blocks = r"model\.encoder\.layers\.\d+"
    alignment = PVLAConfig(
        video=Stream(blocks, tokens=lambda batch, _: slice(batch["input_ids"].shape[1], None), mask="visual_mask"),
        language=Stream(blocks, tokens=lambda batch, _: slice(batch["input_ids"].shape[1]), mask="attention_mask"),
        weight=0.1,
    )

    collator = VLCollator(word_tokenizer("nlvr: two dogs true false vqa: what is it dog cat"), features)

    def trainer(steps, folder):
        torch.manual_seed(0)
        config = VLBartConfig(
            vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
            visual_feature_dim=4, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=2,
        )  # fmt: skip
        model = get_peft_model(VLBartForConditionalGeneration(config), READConfig(r=2))
        args = Seq2SeqTrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_eval_batch_size=4, save_steps=3, logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True,
            lr_scheduler_type="constant", predict_with_generate=True, generation_max_length=6,
        )  # fmt: skip
        return AlignedTrainer(
            model=model, args=args, train_dataset=MultitaskDataset(parts), eval_dataset=MultitaskDataset(parts),
            data_collator=collator, task_batch_sizes={"vqa": 2, "nlvr": 2},
            pvla_config=alignment, task_metrics={"vqa": lambda p: {"rows": len(p.predictions)}},
        )  # fmt: skip

    whole = trainer(7, tmp_path / "whole")
    whole.train()
    log = [entry for entry in whole.state.log_history if "task_loss" in entry]
    assert all(entry["pvla_loss"] > 0 for entry in log)
    assert {name for entry in log for name in entry if name in ("vqa_loss", "nlvr_loss")} == {"vqa_loss", "nlvr_loss"}
    trainer(4, tmp_path / "part").train()
    resumed = trainer(7, tmp_path / "part")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(flat(whole.model), flat(resumed.model))
    result = whole.evaluate()
    assert result["eval_vqa_rows"] == 6
    assert {"eval_vqa_loss", "eval_nlvr_loss", "eval_vqa_pvla_loss", "eval_nlvr_pvla_loss"} <= set(result)
