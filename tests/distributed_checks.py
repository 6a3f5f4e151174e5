"""Run by torchrun on two CPU processes: gradients of DDP and FSDP2 against those of one process.

torchrun --nproc_per_node 2 tests/distributed_checks.py ddp|fsdp2 <folder> [family]
"""

import sys
from pathlib import Path

import test_alignment_task_loss as task_losses
import test_multitask_trainer as multitask
import torch
import torch.distributed as dist
from peft import get_peft_model
from test_alignment_trainer import (
    BLOCKS,
    AlignedTrainer,
    collate,
    items,
    one_step,
    pvla_config,
    reference_gradient,
    relative_error,
    tiny_model,
)

from peft_read import Aligner, READConfig, Stream, set_task
from peft_read.vl_adapter import task_loss

WORLD_SIZE = 2


def check_ddp(folder: Path) -> None:
    """Two processes x accumulation 2 x batch 4 = one batch of 16, with unequal label counts."""
    for family in ("bart", "t5", "gpt2", "llama"):
        for find_unused in (None, True, False):
            actual, log = one_step(
                family,
                folder / family,
                batch_size=4,
                accumulation=2,
                trainer_class=EvaluatingTrainer if find_unused else AssertingTrainer,
                ddp_backend="gloo",
                ddp_find_unused_parameters=find_unused,
            )
            expected, task, pvla = reference_gradient(family, items(family))
            error = relative_error(actual, expected)
            assert error < 1e-5, (family, find_unused, error)
            assert abs(log[0]["task_loss"] - task) < 1e-4 * task, (family, log[0], task)
            assert abs(log[0]["pvla_loss"] - pvla) < 1e-4 * pvla, (family, log[0], pvla)
            if family != "bart":
                break
    check_means_of_micro_batches(folder / "means")
    check_what_only_the_alignment_reaches(folder / "projected")
    check_blocks_that_are_skipped(folder / "skipped")
    check_multitask(folder / "tasks")


def check_means_of_micro_batches(folder: Path) -> None:
    """Models that return the mean of the micro-batch, with and without accumulation: one batch of what all hold."""
    for name in ("masked words", "undivided", "answers"):
        for accumulation in (1, 3):
            rows = task_losses.rows_of(name, 6 * accumulation)
            actual, log = task_losses.step(
                name, folder / name, size=3, accumulation=accumulation, data=rows, ddp_backend="gloo",
                trainer_class=AssertingTrainer,
            )  # fmt: skip
            model, batch = task_losses.MODELS[name](), task_losses.collated(rows)
            aligner = Aligner(model, task_losses.config_of(name))
            with aligner.record() as recording:
                outputs = model(**batch)
            (outputs.loss + aligner.loss(recording, batch, outputs)).backward()
            expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            error = relative_error(actual, torch.cat([grad.flatten() for grad in expected]).double())
            assert error < 1e-5, (name, accumulation, error)
            task = float(outputs.loss.detach())
            assert abs(log[0]["task_loss"] - task) < 1e-4 * task, (name, accumulation, log[0], task)


def check_what_only_the_alignment_reaches(folder: Path) -> None:
    """A trained projection of the video states, from which no output of the model follows."""

    def projected():
        model = tiny_model("bart")
        model.project = torch.nn.Linear(16, 16)
        # A block's output is the states themselves.
        video = Stream(BLOCKS["bart"], tokens=slice(0, 4), output=lambda output: model.project(output))
        return model, pvla_config("bart", video=video)

    model, config = projected()
    batch = collate(items("bart"))
    aligner = Aligner(model, config)
    with aligner.record() as recording:
        outputs = model(**batch)
    (outputs.loss + aligner.loss(recording, batch, outputs)).backward()
    assert model.project.weight.grad.norm() > 0
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model, config = projected()
    actual, _ = one_step(
        "bart", folder, batch_size=4, accumulation=2, model=model, config=config, trainer_class=AssertingTrainer,
        ddp_backend="gloo",
    )  # fmt: skip
    error = relative_error(actual, torch.cat([grad.flatten() for grad in expected]).double())
    assert error < 1e-5, error


def check_blocks_that_are_skipped(folder: Path) -> None:
    """LayerDrop leaves out other blocks in each process: DDP has to look for them."""
    model = tiny_model("bart")
    model.config.encoder_layerdrop = model.model.encoder.layerdrop = 0.5
    one_step(
        "bart", folder, batch_size=4, accumulation=2, model=model, trainer_class=SearchingTrainer, max_steps=3,
        learning_rate=1e-3, ddp_backend="gloo",
    )  # fmt: skip


def check_multitask(folder: Path) -> None:
    """Two processes x accumulation 3 of six batches of three tasks = one step that holds all of them."""
    train = multitask.data()
    actual, log = multitask.step_of(
        folder,
        train,
        options={"task_batch_sizes": {"vqa": 4, "nlvr": 2, "caption": 3}},
        gradient_accumulation_steps=3,
        ddp_backend="gloo",
    )
    assert dist.get_world_size() == WORLD_SIZE
    error = relative_error(actual, multitask.expected_step(train, batches={"vqa": 2, "nlvr": 2, "caption": 2}))
    assert error < 1e-5, error
    mean = sum(log[0][f"{task}_loss"] for task in multitask.TASKS) / 3
    assert abs(log[0]["loss"] - mean) < 1e-4 * mean, log[0]
    check_evaluation(folder / "evaluation")


def check_evaluation(folder: Path) -> None:
    """Two processes fill up the last batch with repetitions; losses and metrics count every example once."""
    train = multitask.data()
    metrics = {task: lambda p: {"rows": len(p.label_ids)} for task in multitask.TASKS}
    for trainer_class in (multitask.PlainTrainer, multitask.GeneratingTrainer):
        trainer = multitask.trainer_of(
            folder,
            train,
            trainer_class,
            evaluation=train,
            options={"task_metrics": metrics},
            per_device_eval_batch_size=3,
            ddp_backend="gloo",
        )
        assert trainer.accelerator.num_processes == WORLD_SIZE
        result = trainer.evaluate()
        model = multitask.tiny_model().eval()
        for task, part in train.by_task().items():
            batch = multitask.collate([part[i] for i in range(len(part))])
            with torch.no_grad(), set_task(model, task):
                logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
            loss = float(task_loss(logits, batch["labels"], multitask.TASKS[task], batch["scores"]).mean)
            assert abs(result[f"eval_{task}_loss"] - loss) < 1e-4 * loss, (task, result, loss)
            assert result[f"eval_{task}_rows"] == len(part), (task, result)


class AssertingTrainer(AlignedTrainer):
    searches = False  # for unused parameters, unless the arguments say it

    def __init__(self, *args, **kwargs):
        self.told = kwargs["args"].ddp_find_unused_parameters
        super().__init__(*args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        assert self.accelerator.num_processes == WORLD_SIZE
        assert type(model).__name__ == "DistributedDataParallel"
        assert model.find_unused_parameters is (self.searches if self.told is None else self.told)
        return super().training_step(model, *args, **kwargs)


class SearchingTrainer(AssertingTrainer):
    searches = True


class EvaluatingTrainer(AssertingTrainer):
    def train(self, *args, **kwargs):
        """Evaluates first: accelerate then takes the bare model for a prepared one and would not wrap it."""
        self.evaluate(self.train_dataset)
        return super().train(*args, **kwargs)


def check_fsdp2(folder: Path) -> None:
    """READ + PVLA under fully_shard per block: loss and gradients of the unsharded model."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD_SIZE
    batch = collate(items("bart"))

    def gradients(shard: bool) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        config = READConfig(r=2, target_modules=["fc2"], init_weights=False)
        model = get_peft_model(tiny_model("bart"), config)
        if shard:
            base = model.get_base_model().model
            for layer in [*base.encoder.layers, *base.decoder.layers]:
                fully_shard(layer)
            fully_shard(model)
        aligner = Aligner(model, pvla_config("bart"))
        with aligner.record() as recording:
            outputs = model(**batch)
        loss = outputs.loss + aligner.loss(recording, batch, outputs)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        return float(loss.detach()), torch.cat([g.flatten() for g in whole])

    (plain_loss, plain), (sharded_loss, sharded) = gradients(False), gradients(True)
    assert plain.abs().max() > 0
    assert abs(plain_loss - sharded_loss) < 1e-5 * abs(plain_loss)
    assert relative_error(sharded.double(), plain.double()) < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"ddp": check_ddp, "fsdp2": check_fsdp2}[sys.argv[1]](Path(sys.argv[2]))
