"""The model card of a saved adapter, and pushing it to a Hub that is not there."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, adapted, build
from torch import nn
from zoo.families import build_model, family_named

from peft_read import BottleneckConfig, CompacterConfig, HyperformerConfig, READConfig
from peft_read.peft_methods.card import update_model_card


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    return card, card.text


@pytest.fixture
def summariser():
    base = build("bart")
    base.name_or_path = base.config._name_or_path = "someone/tiny-bart"
    settings = {"r": 2, "cell": "gru", "task_type": "SEQ_2_SEQ_LM", "rank_pattern": {r"layers\.0\.fc2": 4}}
    return get_peft_model(base, READConfig(**settings, pvla={"mass": 0.5, "weight": 0.01}))


def test_the_card_says_how_to_load_the_adapter(tmp_path, summariser):
    summariser.save_pretrained(tmp_path)
    card, text = card_of(tmp_path)
    assert {"read", "peft-read", "arxiv:2312.06950"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.base_model == "someone/tiny-bart"
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert code.splitlines()[:3] == [
        "import peft_read",
        "from peft import PeftModel",
        "from transformers import AutoModelForSeq2SeqLM",
    ]
    assert 'AutoModelForSeq2SeqLM.from_pretrained("someone/tiny-bart")' in code and "KeyError: 'READ'" in text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", text, re.MULTILINE))
    assert rows["adapted modules"] == "`fc2`" and rows["r"] == "2" and rows["cell"] == "gru"
    trained, total = summariser.get_nb_trainable_parameters()
    assert rows["trained parameters"] == f"{trained:,} ({100 * trained / total:.4f} % of {total:,})"
    assert rows["alignment loss (PVLA): mass"] == "`0.5`" and rows["rank pattern"].startswith("`{")
    assert text.index("# READ adapter") < text.index("Framework versions")


def test_saving_again_renews_the_card_and_keeps_what_others_wrote(tmp_path, summariser):
    summariser.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nResults: see the paper.\n")
    summariser.peft_config["default"].pvla = None
    summariser.save_pretrained(tmp_path)
    _, text = card_of(tmp_path)
    assert text.count("# READ adapter") == 1 and "Results: see the paper." in text and "PVLA" not in text


def test_an_adapter_of_another_name_has_a_card_in_both_places(tmp_path):
    model = get_peft_model(build("bart"), READConfig(), adapter_name="summaries")
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "summaries"):
        card, text = card_of(folder)
        assert "import peft_read" in text and "peft-read" in card.data.tags
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("A page of my own.\n")
    model.save_pretrained(tmp_path / "other" / "adapter")
    assert (tmp_path / "other" / "README.md").read_text() == "A page of my own.\n"


def test_a_model_without_a_task_names_its_class(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    model = get_peft_model(Encoder(), READConfig(target_modules=["linear"], modules_to_save=None))
    model.save_pretrained(tmp_path, safe_serialization=False)
    _, text = card_of(tmp_path)
    assert f"from {__name__} import Encoder" in text
    trained, total = model.get_nb_trainable_parameters()
    assert f"{trained:,} ({100 * trained / total:.4f} % of {total:,})" in text


@pytest.mark.parametrize(
    ("family", "task", "loader"),
    [
        ("qwen3_vl", "CAUSAL_LM", "AutoModelForImageTextToText"),
        ("llava_onevision", None, "AutoModelForImageTextToText"),
        ("llama", "CAUSAL_LM", "AutoModelForCausalLM"),
        ("bart", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("bart", "FEATURE_EXTRACTION", "AutoModelForSeq2SeqLM"),  # the adapter's names are those of this class
    ],
)
def test_the_card_names_what_loads_the_base_model(tmp_path, family, task, loader):
    base = build_model(family_named(family)) if family not in FAMILIES else build(family)
    model = get_peft_model(base, READConfig(task_type=task))
    model.save_pretrained(tmp_path)
    assert f"base = {loader}.from_pretrained" in card_of(tmp_path)[1]
    getattr(transformers, loader).from_config(base.config)  # it does
    # From the files alone, as the command writes it.
    (tmp_path / "README.md").unlink()
    config = PeftConfig.from_pretrained(tmp_path)
    update_model_card(tmp_path, config, config.auto_mapping)
    assert f"base = {loader}.from_pretrained" in card_of(tmp_path)[1]


def test_the_card_names_the_class_that_no_auto_class_makes(tmp_path):
    """An older class of its own, and a class of a library that is imported from nowhere but the user's own code."""
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    base = transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**sizes))
    get_peft_model(base, READConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert "from transformers import GPT2DoubleHeadsModel" in card_of(tmp_path)[1]
    config = PeftConfig.from_pretrained(tmp_path)
    update_model_card(tmp_path, config, {"parent_library": "no_such_library", "base_model_class": "Model"})
    assert "from no_such_library import Model" in card_of(tmp_path)[1]


def test_the_card_tells_how_to_install_what_is_on_no_index(tmp_path, summariser):
    summariser.save_pretrained(tmp_path)
    text = card_of(tmp_path)[1]
    assert "pip install peft-read" not in text and "pip install ." in text and "checkout" in text and ".whl" in text


def card_on_the_hub(load):
    """ModelCard.load for files as ever; there is nothing on the Hub."""

    def stub(name, **settings):
        if not Path(name).exists():
            raise LocalEntryNotFoundError("no card there yet")
        return load(name, **settings)

    return stub


@pytest.mark.parametrize(
    ("config", "tags"),
    [
        (READConfig(r=2, cell="gru"), {"read", "arxiv:2312.06950"}),
        (BottleneckConfig(r=4, tasks=["caption", "nlvr"], share="up"), {"bottleneck-adapter", "arxiv:1902.00751"}),
        (CompacterConfig(r=4), {"compacter", "arxiv:2106.04647"}),
        (HyperformerConfig(r=4, tasks=["caption", "nlvr"]), {"hyperformer", "arxiv:2106.04489"}),
    ],
    ids=lambda value: getattr(value, "peft_type", None) and value.peft_type.value,
)
def test_pushing_to_the_hub(tmp_path, monkeypatch, config, tags):
    """The files that leave for the Hub are a working adapter with its card; the Hub itself is a stub."""
    import transformers.utils.hub as hub

    base = build("bart")
    base.name_or_path = base.config._name_or_path = "someone/tiny-bart"
    adapter = get_peft_model(base, config)
    sent, repositories = {}, []

    class Address:
        repo_id, endpoint = "me/tiny-bart", "https://hub.invalid"

        def __str__(self):
            return "https://hub.invalid/me/tiny-bart"

    class Api:
        def __getattr__(self, name):
            raise AssertionError(f"an unexpected call to the Hub: {name}")

        def create_repo(self, repo_id, **settings):
            repositories.append(repo_id)
            return Address()

        def create_commit(self, repo_id, operations, **settings):
            for operation in operations:
                sent[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub.ModelCard, "load", card_on_the_hub(hub.ModelCard.load))
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapter.push_to_hub("me/tiny-bart")
    assert repositories == ["me/tiny-bart"]
    assert set(sent) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard(sent["README.md"].decode())
    assert card.data.library_name == "peft" and {"peft-read", *tags} <= set(card.data.tags)
    assert card.data.base_model == "someone/tiny-bart" and card.text.count("import peft_read") == 1
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(build("bart"), tmp_path)
    for name, parameter in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_the_card_of_an_adapter_with_every_setting(tmp_path):
    model = adapted(
        "bart", target_modules=r".*encoder.*fc2", bidirectional=True, use_bias=False, modules_to_save=["lm_head"]
    )
    model.save_pretrained(tmp_path)
    _, text = card_of(tmp_path)
    assert "| cell | rnn, bidirectional |" in text and "| biases | no |" in text
    assert "| adapted modules | `.*encoder.*fc2` |" in text and "`['lm_head']`" in text
