"""Run peft's own test suite against a method of this package in place of those it was written for.

    python tests/upstream/run_peft_suite.py            # READ, all suites, about ten minutes on one core
    python tests/upstream/run_peft_suite.py custom decoder -x
    python tests/upstream/run_peft_suite.py --method COMPACTER custom

The source distribution of the installed peft is downloaded, since wheels carry no tests; nothing of it is kept. The
suites' tables of configurations are replaced by the method's, and the tiny models that they fetch from the Hub are
made here, with the same names and random weights. Only tests that take the method's configuration are run. Tests of
merging are left to skip themselves, as they do for peft's own methods that cannot be merged.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUITES = {
    "config": "test_config.py",
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "feature_extraction": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "token_classification": "test_token_classification_qa.py",
}

# Prepended to every suite; the tables replace those of the same name. Of each method: the class of its configurations,
# what they cannot do without, settings for models of transformers, and the tables for models of the suite's own.
PRELUDE = """
import functools
import peft_read
from peft_read import {config}

_plain_init = {config}.__init__
@functools.wraps(_plain_init)
def _init(self, *arguments, **settings):  # tests that make a configuration of nothing but targets
    _plain_init(self, *arguments, **{{**{needed}, **settings}})
{config}.__init__ = _init

def _our_configs(task_type):
    return [({config}, {{"task_type": task_type, "target_modules": None, **settings}}) for settings in {settings}]

OUR_CUSTOM_CASES = [(f"{{name}} {method}", model, {config}, settings) for name, model, settings in {custom}]
OUR_ACTIVE_CASES = [(f"{method} {{name}}", "{lower}", {config}, {{**one, "init_weights": False}},
                     {{**two, "init_weights": False}}) for name, one, two in {active}]
"""
TASK = {"tasks": ["a"]}  # alone, it needs no choice
METHODS: dict[str, dict[str, Any]] = {
    "READ": {
        "config": "READConfig",
        "needed": {},
        "settings": [{"r": 4}, {"r": 2, "cell": "gru", "use_bias": False}, {"r": 2, "cell": "lstm"},
                     {"r": 4, "cell": "none"}],
        "custom": [
            ("MLP", "MLP", {"target_modules": "lin0"}),
            ("MLP list", "MLP", {"target_modules": ["lin0"]}),
            ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"]}),
            ("MLP r", "MLP", {"target_modules": ["lin0"], "r": 2}),
            ("MLP no bias", "MLP", {"target_modules": ["lin0"], "use_bias": False}),
            ("MLP modules_to_save", "MLP", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
            ("MLP GRU", "MLP", {"target_modules": ["lin0", "lin1"], "cell": "gru"}),
            ("MLP LSTM", "MLP", {"target_modules": ["lin0", "lin1"], "cell": "lstm"}),
            ("MLP none", "MLP", {"target_modules": ["lin0", "lin1"], "cell": "none"}),
            ("MLP both ways", "MLP", {"target_modules": ["lin0"], "bidirectional": True}),
            ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
            ("Conv1D saved", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
        ],
        "active": [
            ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
            ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
            ("two cells", {"target_modules": ["lin0"], "cell": "gru"}, {"target_modules": ["lin0"], "r": 2}),
        ],
    },
    "BOTTLENECK": {
        "config": "BottleneckConfig",
        "needed": {},
        "settings": [{}, {"r": 4, "norm_before": True}, {"r": 4, "low_rank": 2}, {"r": 4, **TASK, "share": "down"}],
        "custom": [
            ("MLP", "MLP", {"target_modules": "lin0"}),
            ("MLP list", "MLP", {"target_modules": ["lin0"], "reduction_factor": 4}),
            ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2}),
            ("MLP norms", "MLP", {"target_modules": ["lin0"], "r": 4, "norm_before": True, "norm_after": True}),
            ("MLP low rank", "MLP", {"target_modules": ["lin0"], "r": 4, "low_rank": 1}),
            ("MLP tasks", "MLP", {"target_modules": ["lin0"], "r": 4, **TASK}),
            ("MLP half", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, **TASK, "share": "up"}),
            ("MLP relu", "MLP", {"target_modules": ["lin0"], "activation": "relu"}),
            ("MLP modules_to_save", "MLP", {"target_modules": ["lin1"], "modules_to_save": ["lin0"], "r": 2}),
            ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1, "activation": "linear"}),
            ("Conv1D saved", "EmbConv1D",
             {"target_modules": ["conv1d"], "modules_to_save": ["emb"], "r": 1, "activation": "linear"}),
        ],
        "active": [
            ("same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
            ("different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"], "r": 2}),
            ("two widths", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"], "norm_after": True}),
        ],
    },
    "COMPACTER": {
        "config": "CompacterConfig",
        "needed": {},
        "settings": [{"r": 4}, {"r": 4, "phm_dim": 2, "shared_rule": None, "factorized_rank": None},
                     {"r": 4, **TASK, "shared_rule": "tasks"}],
        "custom": [
            ("MLP", "MLP", {"target_modules": "lin0", "r": 4}),
            ("MLP own rules", "MLP", {"target_modules": ["lin0"], "r": 4, "shared_rule": None}),
            # Without the norm the suite's rate of 0.5 drives products of three trained factors to infinity.
            ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, "phm_dim": 2, "norm_before": True}),
            ("MLP full", "MLP", {"target_modules": ["lin0"], "r": 4, "factorized_rank": None}),
            ("MLP tasks", "MLP", {"target_modules": ["lin0"], "r": 4, **TASK, "shared_rule": "tasks"}),
            ("MLP norms", "MLP", {"target_modules": ["lin0"], "r": 4, "norm_before": True, "norm_after": True}),
            ("MLP modules_to_save", "MLP",
             {"target_modules": ["lin1"], "modules_to_save": ["lin0"], "r": 2, "phm_dim": 2, "norm_before": True}),
            ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1, "phm_dim": 1}),
        ],
        "active": [
            ("same", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"], "r": 4}),
            ("different", {"target_modules": ["lin0"], "r": 4},
             {"target_modules": ["lin1"], "r": 2, "phm_dim": 2, "shared_rule": None}),
        ],
    },
    "HYPERFORMER": {
        "config": "HyperformerConfig",
        "needed": TASK,
        # They count parameters, of which a hypernetwork has as many for one layer as for all.
        "left_out": ["layer_indexing"],
        "settings": [{"r": 4, **TASK}, {"r": 4, **TASK, "shared_generator": True, "norm_before": True}],
        "custom": [
            # Without the norm the suite's inputs, up to 89, and its rate of 0.5 drive generated weights to infinity.
            ("MLP", "MLP", {"target_modules": "lin0", **TASK, "norm_before": True}),
            ("MLP list", "MLP", {"target_modules": ["lin0"], "r": 4, **TASK, "shared_generator": True}),
            ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, **TASK, "norm_before": True}),
            ("MLP norms", "MLP", {"target_modules": ["lin0"], **TASK, "norm_before": True, "norm_after": True}),
            ("MLP modules_to_save", "MLP",
             {"target_modules": ["lin1"], "modules_to_save": ["lin0"], "r": 2, **TASK, "norm_before": True}),
            ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1, **TASK}),
        ],
        "active": [
            ("same", {"target_modules": ["lin0"], **TASK}, {"target_modules": ["lin0"], **TASK}),
            ("different", {"target_modules": ["lin0"], **TASK}, {"target_modules": ["lin1"], "r": 2, **TASK}),
        ],
    },
}  # fmt: skip

TABLES = {
    "TEST_CASES": "OUR_CUSTOM_CASES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "OUR_ACTIVE_CASES",
    "REQUIRES_GRAD_TEST_CASES": "OUR_CUSTOM_CASES",
}
TASKS = {
    "test_decoder_models.py": "CAUSAL_LM",
    "test_encoder_decoder_models.py": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models.py": "FEATURE_EXTRACTION",
    "test_seq_classifier.py": "SEQ_CLS",
}


def unpack_tests(folder: Path) -> Path:
    """Download the installed peft's sources and return the folder of their tests."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", "peft", "--no-deps"]
    command += ["--no-build-isolation", "-d", str(folder), f"peft=={version('peft')}"]
    subprocess.run(command, check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("peft-*/tests"))
    (tests / "__init__.py").touch()  # the suites import each other relatively; the archive leaves this file out
    return tests


def put_method_in(tests: Path, name_of_method: str) -> None:
    """Replace the suites' configurations, and tell their helpers what the method does not do."""
    method = METHODS[name_of_method]
    config = method["config"]
    prelude = PRELUDE.format(method=name_of_method, lower=name_of_method.lower(), **method)
    for name in SUITES.values():
        path = tests / name
        text = path.read_text()
        for table, replacement in TABLES.items():
            text = re.sub(rf"(?ms)^{table} = \[\n.*?^\]\n", f"{table} = {replacement}\n", text)
        if name in TASKS:
            configs = f'ALL_CONFIGS = _our_configs("{TASKS[name]}")\n'
            text = re.sub(r"(?ms)^ALL_CONFIGS = \[\n.*?^\]\n", configs, text)
        classes = f"ALL_CONFIG_CLASSES = (({config}, {method['needed']}),)\n"
        text = re.sub(r"(?ms)^ALL_CONFIG_CLASSES = \(\n.*?^\)\n", classes, text)
        text = re.sub(r"(?ms)^def _all_configs\(task_type\):\n.*?^    \]\n", "_all_configs = _our_configs\n", text)
        # Rows that follow nothing move no recurrent weight, whoever trains it, and inputs up to 89 drive tanh into
        # its flat ends: here the rows are the tokens of one sequence, and of ordinary size.
        if name_of_method == "READ":
            text = re.sub(
                r"(?s)(def test_only_params_are_updated.*?\n)( +)(model = self)",
                r'\1\2if model_id == "MLP":\n\2    X = {"X": torch.randn(1, 9, 10)}\n\2\3',
                text,
                count=1,
            )
        path.write_text(_after_imports(text, prelude))

    common = tests / "testing_common.py"
    text = common.read_text()
    text = text.replace("issubclass(config_cls, LilyConfig)", "issubclass(config_cls, (LilyConfig, OurConfig))")
    text = text.replace(
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig)",
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OurConfig)",
    )
    if find_spec("diffusers") is None:  # needed only by suites that are not run here
        text = text.replace("from diffusers import StableDiffusionPipeline", "class StableDiffusionPipeline: pass")
    common.write_text(
        text.replace("\nimport torch\n", f"\nimport torch\nfrom peft_read import {config} as OurConfig\n", 1)
    )


def _after_imports(text: str, prelude: str) -> str:
    """Put the prelude below the license, above the first import."""
    first = re.search(r"(?m)^(from|import) ", text)
    return text[: first.start()] + prelude + "\n" + text[first.start() :]


def make_models(hub: Path) -> None:
    """Save tiny random models under the names that the suites load, relative to the working directory."""
    import peft
    import torch
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
    tokens = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    spread = {"initializer_range": 0.1}
    bert = {**small, **spread, "vocab_size": 1024, "max_position_embeddings": 64}
    llama = {**small, **tokens, **spread, "num_key_value_heads": 2, "max_position_embeddings": 128}
    opt = t.OPTConfig(**tokens, hidden_size=16, ffn_dim=24, num_hidden_layers=5, num_attention_heads=4,
                      word_embed_proj_dim=16, max_position_embeddings=128, init_std=0.1)  # fmt: skip
    gpt2 = t.GPT2Config(vocab_size=1024, n_positions=128, n_embd=32, n_layer=5, n_head=4, bos_token_id=1,
                        eos_token_id=2, **spread)  # fmt: skip
    models = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, opt),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, gpt2),
        "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, gpt2),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": (
            t.GPTJForCausalLM,
            t.GPTJConfig(vocab_size=1024, n_positions=128, n_embd=32, n_layer=5, n_head=4, rotary_dim=4,
                         bos_token_id=1, eos_token_id=2, **spread),
        ),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig(**llama)),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
            t.LlamaForSequenceClassification,
            t.LlamaConfig(**llama),
        ),
        "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**llama)),
        "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig(**llama)),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(**llama, head_dim=8, sliding_window=16),
        ),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
            t.T5ForConditionalGeneration,
            t.T5Config(vocab_size=1024, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, pad_token_id=0,
                       eos_token_id=1, decoder_start_token_id=0, initializer_factor=1.0),
        ),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
            t.BartForConditionalGeneration,
            t.BartConfig(vocab_size=1024, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=4, decoder_ffn_dim=4, init_std=0.1,
                         max_position_embeddings=100, bos_token_id=0, pad_token_id=1, eos_token_id=2,
                         decoder_start_token_id=2, forced_eos_token_id=None),
        ),
    }  # fmt: skip
    encoders = [(owner, "Model") for owner in ("Bert", "Roberta", "Deberta", "DebertaV2")]
    for owner, suffix in [*encoders, *((owner, "ForSequenceClassification") for owner in ("Bert", "Roberta"))]:
        config = getattr(t, f"{owner}Config")(**bert)
        models[f"peft-internal-testing/tiny-random-{owner}{suffix}"] = (getattr(t, owner + suffix), config)
    torch.manual_seed(0)
    for name, (cls, config) in models.items():
        cls(config).save_pretrained(hub / name)
    # A configuration of another method, which the suite loads through the class of ours.
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(hub / "peft-internal-testing/tiny-opt-lora-revision")


def main() -> None:
    """Prepare a temporary folder and run pytest in it."""
    parser = argparse.ArgumentParser(description="Run peft's own tests against one of our methods.")
    parser.add_argument("--method", choices=METHODS, default="READ", help="the method (READ)")
    parser.add_argument("suites", nargs="*", help=f"some of {', '.join(SUITES)}; all if absent")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    arguments, for_pytest = parser.parse_known_args()
    unknown = set(arguments.suites) - set(SUITES)
    if unknown:
        parser.error(f"unknown suites {sorted(unknown)}; choose from {', '.join(SUITES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tests = unpack_tests(folder)
        put_method_in(tests, arguments.method)
        hub = folder / "hub"
        make_models(hub)
        files = [str(tests / SUITES[name]) for name in arguments.suites or SUITES]
        config = METHODS[arguments.method]["config"]
        # The first looks into the download cache of the Hub.
        left_out = ["from_pretrained_cache_dir", *METHODS[arguments.method].get("left_out", [])]
        chosen = " and not ".join([config, *left_out])
        options = ["-k", chosen, "-o", "addopts=", "-p", "no:cacheprovider", *for_pytest]
        # peft makes errors of transformers' deprecations; these, of 5.24, meet every method, its own included.
        for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable", "gradient_checkpointing_disable"):
            options += ["-W", f"ignore:`{name}` is deprecated:FutureWarning"]
        command = [sys.executable, "-m", "pytest", "-q", *options, *files]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Names such as "peft-internal-testing/tiny-random-OPTForCausalLM" are folders of the working directory.
        status = subprocess.run(command, cwd=hub, env=environment).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
