"""torch's own Transformer encoder in evaluation: kept from the kernel that goes past adapted modules."""

from __future__ import annotations

from torch import nn

__all__ = ["keep_slow_paths", "restore_fast_paths"]


class _SlowPath:
    """A forward pre-hook that does nothing, which is enough.

    Args:
        nested: the encoder's `use_nested_tensor`, to be restored; None for a layer.
    """

    def __init__(self, nested: bool | None = None) -> None:
        self.nested = nested

    def __call__(self, module: nn.Module, args: tuple) -> None:
        return None


def keep_slow_paths(model: nn.Module, layer_cls: type) -> None:
    """Keep the encoders of torch's own Transformer that hold adapters from their fast path.

    In evaluation without gradients a layer hands the weights of `linear1` and `linear2` to one fused kernel, past what
    stands in their place; a layer with a forward pre-hook does not do that. The encoder around such layers turns a
    padded batch into a nested tensor for that kernel, which has no shape (B, T, d) to adapt.

    Args:
        model: the adapted model.
        layer_cls: the class of the adapters' layers.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if _is_kept(module) or not any(isinstance(child, layer_cls) for child in module.modules()):
            continue
        nested = getattr(module, "use_nested_tensor", None)
        module.register_forward_pre_hook(_SlowPath(nested))
        if nested:
            module.use_nested_tensor = False


def _is_kept(module: nn.Module) -> bool:
    return any(isinstance(hook, _SlowPath) for hook in module._forward_pre_hooks.values())


def restore_fast_paths(model: nn.Module) -> None:
    """Undo `keep_slow_paths`; hooks are found by looking, since a copied model has hooks but no handles to them."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _SlowPath):
                del module._forward_pre_hooks[number]
                if hook.nested and isinstance(module, nn.TransformerEncoder):
                    module.use_nested_tensor = True
