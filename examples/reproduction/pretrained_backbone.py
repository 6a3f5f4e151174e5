"""A small backbone that is pretrained: its sizes, and what the pretraining saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from run_folder import log_without_times, write_json
from transformers import PreTrainedTokenizerFast, Trainer


def bart_sizes(*, d_model: int, encoder_layers: int, decoder_layers: int, heads: int, ffn_dim: int) -> dict[str, int]:
    """The sizes of a BART whose encoder and decoder are equally wide, as fields of its configuration."""
    return {
        "d_model": d_model,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": ffn_dim,
        "decoder_ffn_dim": ffn_dim,
    }


def save_backbone(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, folder: Path, **record: Any) -> None:
    """Saves the trained backbone and its tokenizer, and `pretraining.json`.

    Args:
        trainer: after training.
        tokenizer: of the backbone; the truncation and padding of its last batch are not saved.
        folder: where to; it exists.
        **record: what else `pretraining.json` holds, beside the number of steps and the end of the log.
    """
    trainer.model.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    log = log_without_times(trainer.state.log_history)[-3:]
    write_json(folder / "pretraining.json", {**record, "steps": trainer.state.global_step, "log": log})
