"""A function of tensors with several implementations: chosen once a call, differentiable, one node of a graph.

`scan.py` and `fused_adapter.py` make one `Operation` each of what they compute. Eager calls go through one autograd
function; while torch.compile traces, the operation is one operator of torch, which runs what eager mode would run.
Second derivatives go through the definition in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from .. import backends

__all__ = ["Gradients", "Implementation", "Operation"]

A = TypeVar("A", bound=NamedTuple)
R = TypeVar("R", bound=NamedTuple)
Gradients = Sequence[Tensor | None]
TOLERANCE = 1e-2  # relative, of a trial; cuBLAS may round to TF32 on either side, a wrong kernel is off by far more
INFRASTRUCTURE = tuple(_C._TorchDispatchModeKey.__members__.values())  # modes that fake or trace: no memory, no values

OPERATIONS: dict[str, Operation[Any, Any]] = {}


@dataclass(frozen=True)
class Implementation(Generic[A, R]):
    """One way to compute an operation.

    Attributes:
        refusal: why it cannot take some arguments, "" if it can; torch.compile traces it.
        forward: computes the results.
        backward: (arguments, results, gradient of the first result, those of the other visible ones, which arguments
            need one) -> the gradients; those that nobody needs may be anything. It runs outside autocast.
        width: (the arguments) -> the width whose trial speaks for them.
        preparing: what the trial runs in, such as a lock for compilers.
    """

    refusal: Callable[[A], str]
    forward: Callable[[A], R]
    backward: Callable[[A, R, Tensor, Gradients, A], A]
    width: Callable[[A], int]
    preparing: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(eq=False)
class Operation(Generic[A, R]):
    """Ties implementations to autograd and torch.compile.

    Attributes:
        name: of the operator in `torch.ops.peft_read`.
        arguments: the class of the arguments; the first one, `x`, says where all happens.
        results: the class of the results.
        visible: how many of the results have gradients and are given to the caller.
        needed: the results that backward passes read. The others are not kept: their owner may change them in place.
        shapes: makes empty results for some arguments.
        reference: the definition in torch.
        example: (width, dtype of x, device) -> small arguments for a trial.
        implementations: by backend.
    """

    name: str
    arguments: type[A]
    results: type[R]
    visible: int
    needed: Collection[str]
    shapes: Callable[[A], R]
    reference: Callable[[A], R]
    example: Callable[[int, torch.dtype, torch.device], A]
    implementations: Mapping[str, Implementation[A, R]]

    def __post_init__(self) -> None:
        self._unneeded: dict[str, Any] = {name: None for name in self.results._fields if name not in self.needed}
        OPERATIONS[self.name] = self
        self._define_operator()

    def choose(self, arguments: A) -> Implementation[A, R] | None:
        """The implementation that takes these arguments, None for torch."""
        x: Tensor = arguments[0]
        name = backends.backend("cpu" if x.is_cpu else x.device.type)
        if name == "torch":
            return None
        implementation = self.implementations.get(name)
        refusal = "it has no loop or kernel" if implementation is None else implementation.refusal(arguments)
        if torch.compiler.is_compiling():
            if refusal or torch.compiler.is_exporting():  # an exported program must run without this package
                return None
        elif refusal := refusal or _observer():
            backends.refuse(self.name, name, refusal)
            return None
        assert implementation is not None
        return implementation if _passes(name, self.name, implementation.width(arguments), x.dtype, x.device) else None

    def __call__(self, implementation: Implementation[A, R], arguments: A) -> tuple[Tensor, ...]:
        """The visible results of arguments that `choose` found an implementation for."""
        if torch.compiler.is_compiling():
            return _several(self._operator(*arguments))[: self.visible]
        if torch.is_grad_enabled():
            for tensor in arguments:
                if tensor is not None and tensor.requires_grad:
                    return _Function.apply(self, implementation, *arguments)
        return implementation.forward(arguments)[: self.visible]

    def for_backward(self, results: R) -> R:
        """The results with None in the place of those that backward passes do not read."""
        return results._replace(**self._unneeded)

    def gradients(
        self, implementation: Implementation[A, R], saved: Sequence[Any], grads: Sequence[Any], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the arguments from what was saved for them, None where none is needed."""
        count, device = len(self.arguments._fields), saved[0].device.type
        arguments, results = self.arguments(*saved[:count]), self.results(*saved[count:])  # type: ignore[call-overload]
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            grad = self.shapes(arguments)[0].zero_() if grads[0] is None else grads[0]
            found = implementation.backward(arguments, results, grad, grads[1:], self.arguments(*needs))  # type: ignore[call-overload]
        return [one if need else None for one, need in zip(found, needs, strict=True)]

    def trial(self, implementation: Implementation[A, R], width: int, dtype: torch.dtype, device: torch.device) -> str:
        """What is wrong with the values and gradients of a small problem."""
        small = self.arguments(*(_as_leaf(one) for one in self.example(width, dtype, device)))  # type: ignore[call-overload]
        leaves = [one for one in small if one is not None and one.requires_grad]
        both = []
        with implementation.preparing():
            for results in (_Function.apply(self, implementation, *small), self.reference(small)[: self.visible]):
                probes = [torch.linspace(-1, 1, one.numel(), device=one.device).view(one.shape) for one in results]
                total = torch.stack([(one.float() * probe).sum() for one, probe in zip(results, probes, strict=True)])
                both.append([*results, *torch.autograd.grad(total.sum(), leaves)])
        for ours, theirs in zip(*both, strict=True):
            tolerance = TOLERANCE if dtype == torch.float32 else 5 * TOLERANCE  # of half precision, some roundings
            # False of a NaN too.
            if not bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3)):
                return "its values or gradients differ from those of torch"
        return ""

    def _define_operator(self) -> None:
        hints = get_type_hints(self.arguments)
        parameters = [f"Tensor{'' if hints[name] is Tensor else '?'} {name}" for name in self.arguments._fields]
        returned = ", ".join("Tensor" for _ in self.results._fields)
        name, count = f"peft_read::{self.name}", len(self.arguments._fields)

        def run(*arguments: Tensor | None) -> Any:
            given = self.arguments(*arguments)  # type: ignore[call-overload]
            return _returned(self._working(given).forward(given))

        def run_backward(needs: list[bool], grads: Any, saved: Any) -> list[Tensor]:
            working = self._working(self.arguments(*saved[:count]))
            kept: list[Tensor] = []
            for one in self.gradients(working, saved, grads, needs):
                if one is not None:  # an operator may return neither views nor a tensor twice
                    seen = one._is_view() or any(one is other for other in kept)
                    kept.append(one.clone(memory_format=torch.contiguous_format) if seen else one)
            return kept

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs, *self.for_backward(self.results(*_several(output))))  # type: ignore[call-overload]
            ctx.set_materialize_grads(False)

        def differentiate(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            needs = list(ctx.needs_input_grad)
            found = iter(backward(needs, list(grads[: self.visible]), list(ctx.saved_tensors)))
            return tuple(next(found) if need else None for need in needs)

        custom_op = torch.library.custom_op
        forward = custom_op(name, run, mutates_args=(), schema=f"({', '.join(parameters)}) -> ({returned})")
        schema = "(bool[] needs, Tensor?[] grads, Tensor?[] saved) -> Tensor[]"
        backward = custom_op(f"{name}_backward", run_backward, mutates_args=(), schema=schema)
        forward.register_fake(lambda *arguments: _returned(self.shapes(self.arguments(*arguments))))
        backward.register_fake(
            lambda needs, grads, saved: [
                torch.empty_like(one, memory_format=torch.contiguous_format)
                for one, need in zip(saved, needs, strict=False)
                if need
            ]
        )
        forward.register_autograd(differentiate, setup_context=keep)
        self._operator = getattr(torch.ops.peft_read, self.name).default

    def _working(self, arguments: A) -> Implementation[A, R]:
        """What an operator of a graph runs; the graph was traced for this backend."""
        return self.implementations[backends.backend(arguments[0].device.type)]


@torch.compiler.assume_constant_result
def _passes(*key: Any) -> bool:
    """Whether an implementation works: backend, operation, width, dtype, device. For torch.compile a constant."""
    passed = backends.trials.get(key)
    if passed is None:
        backend, operation, *small = key
        tried = OPERATIONS[operation]
        passed = backends.passes(key, lambda: tried.trial(tried.implementations[backend], *small))
    return passed


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: Any, implementation: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.operation, ctx.implementation = operation, implementation
        results = implementation.forward(operation.arguments(*arguments))
        ctx.save_for_backward(*arguments, *operation.for_backward(results))
        ctx.set_materialize_grads(False)
        return results[: operation.visible]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        operation, saved, needs = ctx.operation, ctx.saved_tensors, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody wants second derivatives, which cuDNN's recurrences do not have
            arguments = operation.arguments(*saved[: len(needs)])
            before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
            try:  # not `cudnn.flags`, which would set, and can fail on, the precision of products too
                return None, None, *_again(operation.reference(arguments), grads, arguments, needs)
            finally:
                torch.backends.cudnn.enabled = before
        return None, None, *operation.gradients(ctx.implementation, saved, grads, needs)


def _returned(results: Sequence[Tensor]) -> Any:
    """What an operator returns: a tensor or several."""
    return tuple(results) if len(results) > 1 else results[0]


def _several(returned: Any) -> tuple[Tensor, ...]:
    """What an operator has returned, several or not, as several."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def _again(results: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any], needs: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated again, None for inputs that need none."""
    pairs = [(one, grad) for one, grad in zip(results, grads, strict=False) if grad is not None]
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    outputs, known = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, known, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _as_leaf(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


def _observer() -> str:
    """What else than eager autograd is looking on. None of these has a public door; each is checked by a test."""
    if _C._are_functorch_transforms_active():
        return "it is inside a transform of functorch"
    if forward_ad._current_level >= 0:
        return "it is inside forward-mode differentiation"
    if _C._get_tracing_state():
        return "it is being traced"
    if _C._len_torch_dispatch_stack():
        for key in INFRASTRUCTURE:
            if _C._get_dispatch_mode(key) is not None:
                return "its tensors have no values"
    return ""
