"""PVLA in long and distributed training: processes, precision, compilation, memory, interrupted saves."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_checks import check_ddp
from processes import end_of, in_two_processes, start
from test_alignment_trainer import collate, items, pvla_config, relative_error, seq2seq_trainer, tiny_model

from peft_read import Aligner
from peft_read.alignment import last_whole_checkpoint

CHECKS = Path(__file__).with_name("distributed_checks.py")


def test_two_processes_give_the_gradients_of_one(tmp_path):
    in_two_processes(lambda: check_ddp(tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ddp", "fsdp2"])
def test_two_processes_of_torchrun_give_the_gradients_of_one(what, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, CHECKS, what, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def gradients(model, inputs, context):
    aligner = Aligner(model, pvla_config("bart"))
    with context, aligner.record() as recording:
        outputs = model(**inputs)
        loss = outputs.loss + aligner.loss(recording, inputs, outputs)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def test_bfloat16_autocast_stays_near_the_plain_gradients():
    inputs = collate(items("bart"))
    plain = gradients(tiny_model("bart"), inputs, torch.enable_grad())
    mixed = gradients(tiny_model("bart"), inputs, torch.autocast("cpu", torch.bfloat16))
    assert relative_error(mixed, plain) < 2e-2  # bfloat16 has 8 bits: 0.4 % per rounding


def test_a_compiled_model_is_recorded_like_a_plain_one():
    inputs = collate(items("bart"))
    plain = gradients(tiny_model("bart"), inputs, torch.enable_grad())
    model = tiny_model("bart")
    model.compile(backend="eager")
    assert relative_error(gradients(model, inputs, torch.enable_grad()), plain) < 1e-5


@pytest.mark.slow
def test_long_training_keeps_nothing(tmp_path):
    """500 steps leave as many live tensors as 50 do, and no more resident memory than allocators cache."""
    counts = {}

    class CountingTrainer(type(seq2seq_trainer(tmp_path, None))):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step in (50, 499):
                gc.collect()
                counts[self.state.global_step] = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            return loss

    trainer = seq2seq_trainer(tmp_path, pvla_config("bart"), max_steps=500, logging_steps=100)
    trainer.__class__ = CountingTrainer
    trainer.train()
    assert counts[499] <= counts[50] + 5


def test_a_run_killed_while_saving_resumes_from_its_last_whole_checkpoint(tmp_path):
    saved = {"max_steps": 400, "save_strategy": "steps", "save_steps": 1}
    child = start(lambda: seq2seq_trainer(tmp_path, pvla_config("bart"), **saved).train())
    deadline = time.time() + 300
    while not (tmp_path / "checkpoint-3").exists():
        assert time.time() < deadline
        time.sleep(0.005)  # a folder that has just appeared is being written
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    # Whenever the signal came, make sure that a half-written folder is the newest one.
    (tmp_path / "checkpoint-399").mkdir()
    (tmp_path / "checkpoint-399" / "trainer_state.json").write_text('{"global_step": 3')
    last = last_whole_checkpoint(tmp_path)
    assert last is not None and not last.endswith("-399")
    steps = int(last.rsplit("-", 1)[1]) + 2
    trainer = seq2seq_trainer(tmp_path, pvla_config("bart"), max_steps=steps)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == steps
    assert len(trainer.state.log_history) >= 1
