"""Tiny random models of the families READ must work in, with non-zero adapters where asked."""

import torch
import transformers as t
from peft import get_peft_model

from peft_read import READConfig

t.logging.set_verbosity_error()

VOCABULARY = 40
DECODERS = ("gpt2", "llama", "qwen2", "mistral", "opt")
ENCODER_DECODERS = ("bart", "t5")
FAMILIES = DECODERS + ENCODER_DECODERS

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SPECIAL, **BLOCKS, "num_key_value_heads": 1, "max_position_embeddings": 64}


def build(family: str, **changes) -> t.PreTrainedModel:
    """A random model of a family, in evaluation; larger weights than usual, so that tokens differ from each other."""
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(**SPECIAL, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.1, **changes)
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**LLAMA, "initializer_range": 0.2, **changes})),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA, initializer_range=0.2, **changes)),
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**LLAMA, head_dim=8, sliding_window=6, initializer_range=0.2, **changes)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                **SPECIAL, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.1, **changes,
            )
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(
                **SPECIAL, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.1, **changes,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, d_model=16, d_kv=8,
                d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, initializer_factor=0.5, **changes,
            )
        ),
        "bert": lambda: t.BertModel(
            t.BertConfig(
                **{**BLOCKS, "vocab_size": VOCABULARY}, max_position_embeddings=64, initializer_range=0.2, **changes
            )
        ),
    }[family]()  # fmt: skip
    return model.eval()


def adapted(family: str, *, cell: str = "rnn", seed: int = 1, changes: dict | None = None, **settings):
    """A random model with READ that is not the identity, in evaluation."""
    model = build(family, **(changes or {}))
    torch.manual_seed(seed)
    settings = {"init_weights": False, "r": 4, **settings}
    model = get_peft_model(model, READConfig(cell=cell, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "readapter_" in name and "bias" in name:  # padding is often a zero vector, which would hide its traces
                parameter.uniform_(-0.5, 0.5)
    return model


def padded_batch(family: str, *, side: str | None = None, pads=(0, 3, 5), length: int = 8):
    """Token ids (B, T) and their mask, padded on the side that generation with the family needs."""
    side = side or ("left" if family in DECODERS else "right")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (len(pads), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        if count:
            mask[row, slice(None, count) if side == "left" else slice(-count, None)] = 0
    return ids * mask, mask


def read_layers(model) -> list:
    """All layers that READ has put into a model."""
    from peft_read.adapter.layer import READLayer

    return [module for module in model.modules() if isinstance(module, READLayer)]
