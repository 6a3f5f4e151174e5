"""Run peft's own test suite against READ in place of the methods it was written for.

    python tests/upstream/run_peft_suite.py            # all suites, about ten minutes on one core
    python tests/upstream/run_peft_suite.py custom decoder -x

The source distribution of the installed peft is downloaded, since wheels carry no tests; nothing of it is kept. The
suites' tables of configurations are replaced by READ's, and the tiny models that they fetch from the Hub are made
here, with the same names and random weights. Only tests that take READ's configuration are run. Tests of merging are
left to skip themselves, as they do for peft's own methods that cannot be merged.
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

SUITES = {
    "config": "test_config.py",
    "custom": "test_custom_models.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "feature_extraction": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "token_classification": "test_token_classification_qa.py",
}

# Prepended to every suite; the tables replace those of the same name.
PRELUDE = """
import peft_read
from peft_read import READConfig

def _read_configs(task_type):
    return [
        (READConfig, {"task_type": task_type, "target_modules": None, "r": 4}),
        (READConfig, {"task_type": task_type, "target_modules": None, "r": 2, "cell": "gru", "use_bias": False}),
        (READConfig, {"task_type": task_type, "target_modules": None, "r": 2, "cell": "lstm"}),
        (READConfig, {"task_type": task_type, "target_modules": None, "r": 4, "cell": "none"}),
    ]

READ_CUSTOM_CASES = [
    ("MLP READ", "MLP", READConfig, {"target_modules": "lin0"}),
    ("MLP READ list", "MLP", READConfig, {"target_modules": ["lin0"]}),
    ("MLP READ both", "MLP", READConfig, {"target_modules": ["lin0", "lin1"]}),
    ("MLP READ r", "MLP", READConfig, {"target_modules": ["lin0"], "r": 2}),
    ("MLP READ no bias", "MLP", READConfig, {"target_modules": ["lin0"], "use_bias": False}),
    ("MLP READ modules_to_save", "MLP", READConfig, {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
    ("MLP READ GRU", "MLP", READConfig, {"target_modules": ["lin0", "lin1"], "cell": "gru"}),
    ("MLP READ LSTM", "MLP", READConfig, {"target_modules": ["lin0", "lin1"], "cell": "lstm"}),
    ("MLP READ none", "MLP", READConfig, {"target_modules": ["lin0", "lin1"], "cell": "none"}),
    ("MLP READ both ways", "MLP", READConfig, {"target_modules": ["lin0"], "bidirectional": True}),
    ("Conv1D READ", "EmbConv1D", READConfig, {"target_modules": ["conv1d"]}),
    ("Conv1D READ saved", "EmbConv1D", READConfig, {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
]
READ_ACTIVE_CASES = [
    ("READ same", "read", READConfig, {"target_modules": ["lin0"], "init_weights": False},
     {"target_modules": ["lin0"], "init_weights": False}),
    ("READ different", "read", READConfig, {"target_modules": ["lin0"], "init_weights": False},
     {"target_modules": ["lin1"], "init_weights": False}),
    ("READ two cells", "read", READConfig, {"target_modules": ["lin0"], "init_weights": False, "cell": "gru"},
     {"target_modules": ["lin0"], "init_weights": False, "r": 2}),
]
"""

TABLES = {
    "TEST_CASES": "READ_CUSTOM_CASES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "READ_ACTIVE_CASES",
    "REQUIRES_GRAD_TEST_CASES": "READ_CUSTOM_CASES",
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


def put_read_in(tests: Path) -> None:
    """Replace the suites' configurations, and tell their helpers what READ does not do."""
    for name in SUITES.values():
        path = tests / name
        text = path.read_text()
        for table, replacement in TABLES.items():
            text = re.sub(rf"(?ms)^{table} = \[\n.*?^\]\n", f"{table} = {replacement}\n", text)
        if name in TASKS:
            configs = f'ALL_CONFIGS = _read_configs("{TASKS[name]}")\n'
            text = re.sub(r"(?ms)^ALL_CONFIGS = \[\n.*?^\]\n", configs, text)
        text = re.sub(r"(?ms)^ALL_CONFIG_CLASSES = \(\n.*?^\)\n", "ALL_CONFIG_CLASSES = ((READConfig, {}),)\n", text)
        text = re.sub(r"(?ms)^def _all_configs\(task_type\):\n.*?^    \]\n", "_all_configs = _read_configs\n", text)
        # Rows that follow nothing move no recurrent weight, whoever trains it, and inputs up to 89 drive tanh into
        # its flat ends: here the rows are the tokens of one sequence, and of ordinary size.
        text = re.sub(
            r"(?s)(def test_only_params_are_updated.*?\n)( +)(model = self)",
            r'\1\2if model_id == "MLP":\n\2    X = {"X": torch.randn(1, 9, 10)}\n\2\3',
            text,
            count=1,
        )
        path.write_text(_after_imports(text))

    common = tests / "testing_common.py"
    text = common.read_text()
    text = text.replace("issubclass(config_cls, LilyConfig)", "issubclass(config_cls, (LilyConfig, READConfig))")
    text = text.replace(
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig)",
        "config_cls not in (IA3Config, LoHaConfig, LoKrConfig, LoraConfig, READConfig)",
    )
    if find_spec("diffusers") is None:  # needed only by suites that are not run here
        text = text.replace("from diffusers import StableDiffusionPipeline", "class StableDiffusionPipeline: pass")
    common.write_text(text.replace("\nimport torch\n", "\nimport torch\nfrom peft_read import READConfig\n", 1))


def _after_imports(text: str) -> str:
    """Put the prelude below the license, above the first import."""
    first = re.search(r"(?m)^(from|import) ", text)
    return text[: first.start()] + PRELUDE + "\n" + text[first.start() :]


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
    # A configuration of another method, which the suite loads through READ's class.
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(hub / "peft-internal-testing/tiny-opt-lora-revision")


def main() -> None:
    """Prepare a temporary folder and run pytest in it."""
    parser = argparse.ArgumentParser(description="Run peft's own tests against READ.")
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
        put_read_in(tests)
        hub = folder / "hub"
        make_models(hub)
        files = [str(tests / SUITES[name]) for name in arguments.suites or SUITES]
        chosen = "READConfig and not from_pretrained_cache_dir"  # that one looks into the download cache of the Hub
        options = ["-k", chosen, "-o", "addopts=", "-p", "no:cacheprovider", *for_pytest]
        command = [sys.executable, "-m", "pytest", "-q", *options, *files]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Names such as "peft-internal-testing/tiny-random-OPTForCausalLM" are folders of the working directory.
        status = subprocess.run(command, cwd=hub, env=environment).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()
