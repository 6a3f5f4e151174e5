"""Reads reference cases (one .safetensors and one .json) and records what modules put out."""

import json

from safetensors.torch import load_file


def golden_case(path):
    """The tensors of a case by group and name, and its notes."""
    groups = {}
    for key, value in load_file(path).items():
        group, name = key.split("/", 1)
        groups.setdefault(group, {})[name] = value
    return groups, json.loads(path.with_suffix(".json").read_text())


def record_outputs(model):
    """A dict that fills with the output (the first, of a tuple) of every module, by name, at each forward pass."""
    outputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(
                name, output[0] if isinstance(output, tuple) else output
            )
        )
    return outputs
