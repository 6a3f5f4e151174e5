"""The model card of a saved adapter: how to load it, and its settings."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..files import write_whole

if TYPE_CHECKING:
    from .configuration import AdapterConfig

__all__ = ["renew_model_cards", "saved_parameters", "update_model_card"]

BEGIN, END = "<!-- peft-read: begin -->", "<!-- peft-read: end -->"

BASE_TAG = "base_model:adapter:"  # peft's; the name follows

# What loads the base model of a task; and the mappings of what is tried, in this order, where that does not load the
# class at hand (a video-language model that is trained with the task CAUSAL_LM).
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}

# A configuration may come from anywhere: only the classes of these packages are imported to look them up.
LOOKED_UP = ("transformers", "peft_read")


def update_model_card(folder: str | os.PathLike, config: AdapterConfig, auto_mapping: dict | None = None) -> None:
    """Write this package's part of README.md in the folder of a saved adapter; nothing without weights.

    An adapter that is not called "default" is in a folder of its own name, below the card that peft writes;
    both cards are updated then. In every other case a README above the adapter is not changed, and neither is one that
    cannot be read as a card.

    Args:
        folder: where `adapter_config.json` lies.
        config: the adapter's configuration.
        auto_mapping: the class of the base model and its library, as peft records them.

    Raises:
        ValueError: the file of the weights is damaged.
    """
    folder = Path(folder)
    trained = saved_parameters(folder)
    if trained is None:  # a configuration without weights needs no card
        return
    section = _section(trained, config, auto_mapping)
    if (folder / "README.md").exists():
        _write_section(folder / "README.md", section, config)
    else:
        card = ModelCard.from_template(ModelCardData(library_name="peft"))
        _save(card, section, folder / "README.md", config)
    name = getattr(config, "adapter_name", "default")
    if name != "default" and folder.name == name and (folder.parent / "README.md").exists():
        _write_section(folder.parent / "README.md", section, config)


def _write_section(path: Path, section: str, config: AdapterConfig) -> None:
    """Puts this package's part into a card; a file that is not a card of peft is not changed."""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:  # an encoding error is a ValueError
        warnings.warn(f"{path} is not a model card ({error}): the adapter's part is not written into it", stacklevel=2)
        return
    if getattr(card.data, "library_name", None) == "peft":
        _save(card, section, path, config)


def _save(card: ModelCard, section: str, path: Path, config: AdapterConfig) -> None:
    data: Any = card.data
    tags = {*(data.tags or ()), *config.card_tags}
    if not data.base_model:  # peft writes the empty name of a model that came from no folder and not from the Hub
        data.base_model = config.base_model_name_or_path or None
        tags.discard(BASE_TAG)
        tags |= {BASE_TAG + data.base_model} if data.base_model else set()
    data.tags = sorted(tags)
    before, _, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2] if rest else before
    card.text = (before if rest else "") + section + (after if rest else f"\n\n{before.lstrip()}")
    with write_whole(path) as file:
        file.write(str(card))


def renew_model_cards(folder: str | os.PathLike, configs: dict[str, Any]) -> None:
    """Write this package's part into the cards of all its adapters that one model has saved below a folder.

    Args:
        folder: where the model was saved.
        configs: the configuration of each adapter, by name.
    """
    for name, config in configs.items():
        if not hasattr(config, "card_title"):  # of another package
            continue
        place = Path(folder) / ("" if name == "default" else name)
        saved = place / CONFIG_NAME
        mapping = json.loads(saved.read_text()).get("auto_mapping") if saved.exists() else None
        update_model_card(place, config, mapping)


def _section(trained: int, config: AdapterConfig, auto_mapping: dict | None) -> str:
    rows = _facts(trained, config)
    method = getattr(config.peft_type, "value", config.peft_type)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""{BEGIN}
# {config.card_title}

{config.card_text}

```bash
pip install .                                   # in a checkout of peft-read, which is on no index yet
pip install peft_read-*.whl                     # or a wheel built from one
```

```python
{_loading_code(config, auto_mapping)}
```

The first line registers the method with peft. Without it, loading stops with `KeyError: '{method}'`.

| | |
|---|---|
{table}
{END}"""


def _loading_code(config: AdapterConfig, auto_mapping: dict | None) -> str:
    library, cls = _loader(str(getattr(config.task_type, "value", config.task_type)), auto_mapping)
    base = config.base_model_name_or_path or "<the base model>"
    return f"""import peft_read
from peft import PeftModel
from {library} import {cls}

base = {cls}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "<this repository>")"""


def _loader(task: str, auto_mapping: dict | None) -> tuple[str, str]:
    """What to import to load the base model, and from where.

    The Auto class of the task, or another one, that makes the base model's class; the class itself where none does.
    """
    if auto_mapping is None:
        return "transformers", AUTO_CLASSES.get(task, "AutoModel")
    library, name = auto_mapping["parent_library"], auto_mapping["base_model_class"]
    package = library.partition(".")[0]
    if package == "transformers_modules":  # the code of a repository on the Hub, which is no library
        return "transformers", AUTO_CLASSES.get(task, "AutoModel")
    try:
        model_class = getattr(importlib.import_module(library), name, None) if package in LOOKED_UP else None
    except ImportError:  # of a version that this one does not have
        model_class = None
    if model_class is None:
        return library, name
    for auto in (*filter(None, [AUTO_CLASSES.get(task)]), *MAPPINGS):
        if _makes(auto, model_class):
            return "transformers", auto
    return ("transformers" if getattr(transformers, name, None) is model_class else library), name


def _makes(auto: str, model_class: type) -> bool:
    """Whether an Auto class makes models of a class from configurations of theirs."""
    mapping: Any = getattr(transformers, MAPPINGS[auto], {})  # not every version has all of them
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or config_class not in mapping:
        return False
    classes = mapping[config_class]
    return model_class in (classes if isinstance(classes, tuple) else (classes,))


def _facts(trained: int, config: AdapterConfig) -> dict[str, str]:
    """The rows of the card's table."""
    targets = config.target_modules
    named = f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{name}`" for name in sorted(targets or ()))
    facts = {
        "base model": f"`{config.base_model_name_or_path or 'unknown'}`",
        "adapted modules": named,
        **config.card_facts(),
    }
    settings = ("exclude_modules", "layers_to_transform", "rank_pattern", "cell_pattern", "modules_to_save")
    for name in (*settings, "trainable_token_indices"):
        value = getattr(config, name, None)
        if value:
            facts[name.replace("_", " ")] = f"`{sorted(value) if isinstance(value, set) else value}`"
    base = getattr(config, "base_parameters", None)
    share = f" ({100 * trained / (base + trained):.4f} % of {base + trained:,})" if base else ""
    facts["trained parameters"] = f"{trained:,}{share}"
    for name, value in (getattr(config, "pvla", None) or {}).items():
        facts[f"alignment loss (PVLA): {name}"] = f"`{value}`"
    return facts


def saved_parameters(folder: Path) -> int | None:
    """How many numbers a saved adapter holds, modules saved as a whole included; None without weights.

    Raises:
        ValueError: the file of the weights is damaged.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        if path.exists():
            with safe_open(path, framework="pt") as file:
                return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        path = folder / WEIGHTS_NAME
        if path.exists():
            weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return sum(weight.numel() for weight in weights.values())
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} holds no whole weights of an adapter: {reason}") from error
    return None
