"""Run by torchrun on two CPU processes: adapters with weights per task under DDP and FSDP against one process.

torchrun --nproc_per_node 2 tests/distributed_tasks.py
"""

import copy
from contextlib import nullcontext

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from tiny_models import build
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, READConfig, set_task

WORLD_SIZE = 2
TASKS = ["vqa", "gqa", "nlvr"]
CONFIGS = {
    "half": BottleneckConfig(r=4, tasks=TASKS, share="down", init_weights=False),
    "hyperformer": HyperformerConfig(r=4, tasks=TASKS, init_weights=False),
}
# The task of each process in each of two accumulated batches, of two steps; "nlvr" is never served, and in the second
# step of SAME "vqa" is not.
SAME = [[("vqa", "vqa"), ("gqa", "gqa")], [("gqa", "gqa"), ("gqa", "gqa")]]
MIXED = [[("vqa", "gqa"), ("gqa", "gqa")], [("gqa", "vqa"), ("vqa", "vqa")]]


def adapted(config):
    model = build("bart")
    torch.manual_seed(1)
    return get_peft_model(model, copy.deepcopy(config))


def batch_of(step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    ids = torch.randint(3, 40, (2, 6), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)}


def in_one_process(config, schedule) -> list[dict[str, torch.Tensor]]:
    """The gradients of each step, the mean over processes of the sum over accumulated batches."""
    model, actual = adapted(config), []
    for step, micros in enumerate(schedule):
        model.zero_grad()
        for micro, tasks in enumerate(micros):
            for rank, task in enumerate(tasks):
                set_task(model, task)
                (model(**batch_of(step, micro, rank)).loss / WORLD_SIZE).backward()
        actual.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return actual


def compare(actual, expected, case) -> None:
    assert expected and max(g.abs().max() for g in expected.values()) > 0, case
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{case} {n} {m}"
        )
    # Of a task that nobody served there is nothing, or zero, which moves no weight without momentum.
    assert all(not gradient.any() for name, gradient in actual.items() if name not in expected), case


def check_ddp(rank: int) -> None:
    for name, config in CONFIGS.items():
        expected = in_one_process(config, MIXED)
        for search in (True, False):
            wrapped = DistributedDataParallel(adapted(config), find_unused_parameters=search)
            for step, micros in enumerate(MIXED):
                wrapped.zero_grad()
                for micro, tasks in enumerate(micros):
                    set_task(wrapped, tasks[rank])
                    last = micro == len(micros) - 1
                    with nullcontext() if last else wrapped.no_sync():
                        wrapped(**batch_of(step, micro, rank)).loss.backward()
                actual = {n: p.grad for n, p in wrapped.module.named_parameters() if p.grad is not None}
                compare(actual, expected[step], (name, search, step))


def check_fsdp1(rank: int) -> None:
    """With the wrappers that peft's policy puts around leaves; gradients, and what is saved."""
    compacters = {
        f"compacter {rule}": CompacterConfig(r=4, phm_dim=2, tasks=TASKS, shared_rule=rule, init_weights=False)
        for rule in ("model", "tasks", None)
    }
    for name, config in {"read": READConfig(r=4, init_weights=False), **CONFIGS, **compacters}.items():
        expected, plain = in_one_process(config, SAME), adapted(config)
        model = adapted(config)
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
        )
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
            saved = get_peft_model_state_dict(model, state_dict=wrapped.state_dict())
        weights = get_peft_model_state_dict(plain)
        assert saved.keys() == weights.keys() and all(torch.equal(saved[key], weights[key]) for key in weights), name
        for step, micros in enumerate(SAME):
            wrapped.zero_grad()
            for micro, tasks in enumerate(micros):
                set_task(wrapped, tasks[rank])
                wrapped(**batch_of(step, micro, rank)).loss.backward()
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            actual = {n.replace("_fsdp_wrapped_module.", ""): gradient for n, gradient in gradients.items()}
            compare(actual, expected[step], (name, "fsdp1", step))


def check_fsdp2(rank: int) -> None:
    """Each process serves the same task in a step: weights without a gradient on one side cannot be reduced."""
    for name, config in CONFIGS.items():
        expected = in_one_process(config, SAME)
        model = adapted(config)
        base = model.get_base_model()
        for layer in [*base.model.encoder.layers, *base.model.decoder.layers]:
            fully_shard(layer)
        fully_shard(model)
        for step, micros in enumerate(SAME):
            model.zero_grad()
            for micro, tasks in enumerate(micros):
                set_task(model, tasks[rank])
                model(**batch_of(step, micro, rank)).loss.backward()
            actual = {
                n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            compare(actual, expected[step], (name, "fsdp2", step))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == WORLD_SIZE
    check_ddp(dist.get_rank())
    check_fsdp1(dist.get_rank())
    check_fsdp2(dist.get_rank())
    dist.destroy_process_group()
