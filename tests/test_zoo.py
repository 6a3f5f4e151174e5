"""READ on the families of transformers, by tiny random models: the checks of `zoo`, on a fixed list of families."""

import pytest
from zoo.checks import check_family, faults
from zoo.families import build_case, family_named

QUICK = ["bert", "gpt2", "llama", "t5", "vit", "llava", "qwen2_vl", "vivit"]
VISION = [
    "aya_vision", "blip", "blip-2", "clip", "cohere2_vision", "deepseek_vl", "dinov2", "emu3", "florence2",
    "gemma3", "git", "glm4v", "got_ocr2", "idefics", "idefics2", "idefics3", "instructblip",
    "instructblipvideo", "internvl", "kosmos-2", "lfm2_vl", "lighton_ocr", "llava_next", "llava_next_video",
    "llava_onevision", "mistral3", "mllama", "ovis2", "paligemma", "qwen2_5_vl", "qwen3_5", "qwen3_vl",
    "siglip", "smolvlm", "timesformer", "udop", "video_llava", "videomae", "vipllava",
]  # fmt: skip
TEXT_AND_SOUND = [
    "albert", "arcee", "bamba", "bart", "bigbird_pegasus", "biogpt", "blenderbot", "bloom", "codegen", "cohere",
    "convbert", "ctrl", "deberta-v2", "deepseek_v3", "distilbert", "electra", "ernie4_5", "exaone4", "falcon",
    "falcon_h1", "falcon_mamba", "funnel", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoehybrid", "hubert", "jamba", "jetmoe", "led", "lfm2",
    "longt5", "m2m_100", "mamba", "mamba2", "marian", "mbart", "minimax", "ministral", "mistral", "mixtral",
    "modernbert", "mpt", "mt5", "nemotron_h", "olmo3", "opt", "pegasus", "pegasus_x", "phi3", "prophetnet",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma", "roberta", "smollm3",
    "speech_to_text", "stablelm", "starcoder2", "switch_transformers", "t5gemma", "umt5", "wav2vec2", "whisper",
    "xglm", "zamba2",
]  # fmt: skip


# What READ refuses by name, with the reason it gives; everything else is exact.
REFUSED = {
    "funnel": {"left padding": "it is unknown which", "right padding": "it is unknown which"},
    "prophetnet": {"cache": "does not follow the cache of ProphetNetDecoder"},
}


def refusals(results):
    """The message of each check that READ refuses, by check."""
    checks = [item for setting in results.values() for item in setting.get("checks", {}).items()]
    return {name: check["read"]["error"] for name, check in checks if check["verdict"] == "refused"}


def check(name):
    try:
        family = family_named(name)
    except KeyError as error:
        pytest.skip(str(error))
    results = check_family(build_case(family))["settings"]
    wrong = [f"{setting}: {what}" for setting, result in results.items() for what in faults(result).items()]
    assert not wrong, "\n".join(wrong)
    refused, expected = refusals(results), REFUSED.get(name, {})
    assert refused.keys() == expected.keys()
    assert all(reason in refused[what] for what, reason in expected.items())


@pytest.mark.parametrize("name", QUICK)
def test_a_family_in_brief(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION + TEXT_AND_SOUND)
def test_a_family(name):
    check(name)
