"""MultitaskMixin with decoder-only models, with one LoRA per task, with generation, and over several processes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from test_multitask_trainer import (
    AlignedTrainer,
    GeneratingTrainer,
    collate,
    data,
    flat,
    relative_error,
    tiny_model,
    trainer_of,
)
from tiny_models import build
from torch import nn
from torch.utils.data import BatchSampler
from transformers import BartConfig, BartForCausalLM, BertConfig, BertForMaskedLM

from peft_read import Stream
from peft_read.alignment import PVLAConfig
from peft_read.alignment import trainer as alignment_trainer
from peft_read.alignment.evaluation import counted_rows
from peft_read.data import MultitaskDataset
from peft_read.vl_adapter import task_loss
from peft_read.vl_adapter import trainer as multitask_trainer
from peft_read.vl_adapter.shift import loss_shifts_labels

# Decoder-only models


def texts(task):
    """Six texts of eight tokens, of which the last three to seven are to be predicted."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(6):
        ids = torch.randint(4, 40, (8,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index % 5] = -100
        rows.append({"input_ids": ids, "labels": labels, "scores": torch.tensor(1.0)})
    return MultitaskDataset({task: rows})


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 does not say the kind of its loss
@pytest.mark.parametrize("accumulation", [1, 3])
def test_decoder_only_models_are_trained_on_the_next_token_as_by_their_own_loss(tmp_path, family, accumulation):
    train = texts("caption")
    batch = {name: v for name, v in collate([train[i] for i in range(6)]).items() if name not in ("task", "scores")}
    model = build(family, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}))
    expected = copy.deepcopy(model).train()
    loss = expected(**batch).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in expected.parameters()]).double()
    before = flat(model)
    trained = trainer_of(
        tmp_path, train, model=model, per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert relative_error(before - flat(model), gradient) < 1e-4
    assert trained.evaluate(train)["eval_caption_loss"] > 0


def test_the_shifted_loss_of_a_task_by_hand():
    logits, labels = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 2, 3]] * 2)
    labels[1, :3] = -100
    c = -logits.log_softmax(-1)
    first, second = (c[0, 0, 1] + c[0, 1, 2] + c[0, 2, 3]) / 3, c[1, 2, 3]
    for kind, total, divisor in (("sample_mean", first + second, 2), ("token_mean", 3 * first + second, 4)):
        summed = task_loss(logits, labels, kind, shift=True)
        torch.testing.assert_close(summed.total, total)
        assert summed.divisor == divisor


def test_a_model_whose_own_loss_is_another_than_its_kind_tells_is_refused(tmp_path):
    """BartForCausalLM compares logits and labels at the same place."""
    sizes = {"decoder_layers": 1, "d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    model = BartForCausalLM(BartConfig(vocab_size=40, max_position_embeddings=32, init_std=0.3, **sizes))
    trained = trainer_of(tmp_path, texts("caption"), model=model)
    with pytest.raises(ValueError, match=r"BartForCausalLM's own .* labels\[:, t\].*loss_shifts_labels=True"):
        trained.train()
    trainer_of(tmp_path, texts("caption"), model=model, options={"loss_shifts_labels": False}).train()


def test_what_models_tell_about_their_labels():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert not loss_shifts_labels(BertForMaskedLM(BertConfig(vocab_size=9, **small)))
    assert not loss_shifts_labels(build("t5"))
    assert loss_shifts_labels(get_peft_model(build("llama"), LoraConfig(r=2)))
    with pytest.raises(ValueError, match="Linear is no encoder-decoder model and has no known loss_function"):
        loss_shifts_labels(nn.Linear(2, 2))


# One LoRA per task


def lora_per_task(tasks=("vqa", "nlvr")):
    model, lora = tiny_model((), dropout=0.3), {"r": 2, "target_modules": ["q", "v"], "lora_dropout": 0.2}
    first = LoraConfig(**lora, modules_to_save=["final_layer_norm"])
    model = get_peft_model(model, first, adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, LoraConfig(**lora))
    model.base_model.set_requires_grad(list(tasks))
    return model


def run(folder, steps, resume=None, **arguments):
    trained = trainer_of(
        folder, data(vqa=8, nlvr=4), model=lora_per_task(), max_steps=steps, learning_rate=0.05, seed=3,
        optim="adamw_torch", save_strategy="steps", evaluation=data(vqa=3, nlvr=3),
        options={"task_batch_sizes": {"vqa": 2, "nlvr": 2}}, **arguments,
    )  # fmt: skip
    trained.train(resume_from_checkpoint=resume)
    return trained


def test_a_resumed_run_of_one_lora_per_task_equals_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole", 10, save_steps=4)
    run(tmp_path / "parts", 4, save_steps=4)
    resumed = run(tmp_path / "parts", 10, str(tmp_path / "parts" / "checkpoint-4"), save_steps=4)
    assert torch.equal(flat(whole.model), flat(resumed.model))
    names = [{n for n, p in t.model.named_parameters() if p.requires_grad} for t in (whole, resumed)]
    assert names[0] == names[1] and {"vqa", "nlvr"} <= {part for name in names[0] for part in name.split(".")}
    other = trainer_of(tmp_path, data(vqa=8, nlvr=4), model=lora_per_task(("vqa", "gqa")))
    with pytest.raises(ValueError, match=r"has the adapters \['nlvr', 'vqa'\], and the model \['gqa', 'vqa'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))


def test_the_best_adapters_of_all_tasks_are_loaded_at_the_end(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nlvr_loss", "greater_is_better": True}
    trained = run(tmp_path, 6, eval_strategy="steps", eval_steps=2, save_steps=2, **best)
    checkpoint = trained.state.best_model_checkpoint
    assert not checkpoint.endswith("checkpoint-6")  # the highest loss, so that it is not the last one
    for task in ("vqa", "nlvr"):
        saved = load_file(f"{checkpoint}/{task}/adapter_model.safetensors")
        own = get_peft_model_state_dict(trained.model, adapter_name=task)
        assert set(own) == set(saved) and all(torch.equal(own[name], saved[name]) for name in own), task


# Evaluation


def test_arguments_of_generate_in_a_call_reach_every_task_and_go_before_those_of_the_task(tmp_path, monkeypatch):
    metrics = {task: lambda p: {} for task in ("vqa", "nlvr")}
    trained = trainer_of(
        tmp_path, data(vqa=2, nlvr=2), GeneratingTrainer, model=tiny_model(()), evaluation=data(vqa=2, nlvr=2),
        predict_with_generate=True,
        options={"task_metrics": metrics, "task_generation": {"vqa": {"max_length": 5, "num_beams": 3}}},
    )  # fmt: skip
    calls, generate = [], trained.model.generate
    monkeypatch.setattr(trained.model, "generate", lambda **given: calls.append(given) or generate(**given))

    def asked():
        names = ("num_beams", "max_length", "max_new_tokens")
        seen = [{n: call[n] for n in names if call.get(n) is not None} for call in calls]
        calls.clear()
        return seen

    result = trained.evaluate(num_beams=2, max_new_tokens=3)
    assert asked() == [{"num_beams": 2, "max_new_tokens": 3}] * 2
    assert {"eval_vqa_loss", "eval_nlvr_loss", "eval_vqa_runtime", "eval_nlvr_runtime"} <= set(result)
    trained.evaluate(data(vqa=2), metric_key_prefix="test")
    assert asked() == [{"max_length": 5, "num_beams": 3}]
    trained.predict(data(vqa=2).by_task()["vqa"], max_length=4)
    assert asked() == [{"max_length": 4, "num_beams": 3}]


def test_settings_of_the_loader_are_honoured(tmp_path):
    loader = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False}
    made = trainer_of(tmp_path, data(), **loader).get_train_dataloader()
    assert made.multiprocessing_context.get_start_method() == "spawn" and made.in_order is False
    assert made.worker_init_fn is not None


def test_a_task_that_only_the_evaluation_has_can_be_named(tmp_path):
    options = {"task_metrics": {"nlvr": lambda p: {}}, "task_losses": {"nlvr": "token_mean"}}
    trained = trainer_of(tmp_path, data(vqa=2), model=tiny_model(()), evaluation=data(nlvr=2), options=options)
    assert trained._kind_of("nlvr") == "token_mean"


def stand_in(rank, *, remainder, at_the_end, even=True):
    loader = object()
    state = SimpleNamespace(active_dataloader=loader, end_of_dataloader=at_the_end, remainder=remainder)
    accelerator = SimpleNamespace(gradient_state=state, even_batches=even, process_index=rank)
    return SimpleNamespace(accelerator=accelerator, callback_handler=SimpleNamespace(eval_dataloader=loader))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 3, 4, 7, 12, 13])
def test_every_example_is_counted_once_over_the_processes(processes, length):
    size, seen = 2, []
    for rank in range(processes):
        plain = BatchSampler(range(length), size, drop_last=False)
        batches = list(BatchSamplerShard(plain, processes, rank))
        for index, batch in enumerate(batches):
            trainer = stand_in(rank, remainder=length % (processes * size), at_the_end=index == len(batches) - 1)
            seen += batch[: counted_rows(trainer, len(batch))]
    assert sorted(seen) == list(range(length))


def test_all_rows_count_where_nothing_was_filled_up():
    assert counted_rows(stand_in(1, remainder=1, at_the_end=True, even=False), 2) == 2
    assert counted_rows(stand_in(1, remainder=-1, at_the_end=True), 2) == 2
    assert counted_rows(stand_in(1, remainder=1, at_the_end=False), 2) == 2
    elsewhere = stand_in(1, remainder=1, at_the_end=True)
    elsewhere.callback_handler.eval_dataloader = None  # a loader of one's own within the training loop
    assert counted_rows(elsewhere, 2) == 2


def test_repetitions_change_neither_losses_nor_metrics(tmp_path, monkeypatch):
    """As in a process whose last batch begins with one example of the data."""
    config = PVLAConfig(
        video=Stream(r"encoder\.block\.\d+", tokens=slice(0, 4)),
        language=Stream(r"encoder\.block\.\d+", tokens=slice(4, None)),
    )
    model, part, gathered = tiny_model(()), data(vqa=8).by_task()["vqa"], []

    def evaluated(count):
        options = {"pvla_config": config, "task_metrics": {"vqa": lambda p: {"rows": len(p.predictions)}}}
        evaluation = MultitaskDataset({"vqa": [part[i] for i in range(count)]})
        trained = trainer_of(
            tmp_path, data(vqa=8), AlignedTrainer, model=model, per_device_eval_batch_size=3, evaluation=evaluation,
            predict_with_generate=True, options=options,
        )  # fmt: skip
        gather = trained.accelerator.gather_for_metrics
        monkeypatch.setattr(trained.accelerator, "gather_for_metrics", lambda x: gathered.append(1) or gather(x))
        return trained.evaluate()

    alone = evaluated(1)
    assert gathered  # Seq2SeqTrainer's own way keeps the repetitions
    for module in (multitask_trainer, alignment_trainer):
        monkeypatch.setattr(module, "counted_rows", lambda trainer, rows: 1)
    three = evaluated(3)
    for name in ("eval_vqa_loss", "eval_vqa_pvla_loss"):
        assert three[name] == pytest.approx(alone[name], rel=1e-5)
