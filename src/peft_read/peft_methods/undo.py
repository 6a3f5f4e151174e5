"""Taking back what an adapter that is refused half-way has done to a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Before", "undone_on_error"]


class Before:
    """What a model is made of at one moment: its modules, their hooks and attributes, and what is trained.

    Values of parameters are not kept.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, dict(vars(module))) for module in model.modules()]
        # By id, since several modules may hold one container, as all that know a model's configurations do.
        containers = {id(value): value for _, state in self.modules for value in state.values() if _is_plain(value)}
        self.containers = [(value, value.copy()) for value in containers.values()]
        self.parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back; containers are kept, since the handles of hooks refer to them."""
        for module, state in self.modules:
            own = vars(module)
            for name in own.keys() - state.keys():
                del own[name]
            own.update(state)
        for container, content in self.containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self.parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def _is_plain(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, set)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was before, if what is done to it here raises an exception."""
    before = Before(model)
    try:
        yield
    except Exception:
        before.restore()
        raise
