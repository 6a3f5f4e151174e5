"""What a pretraining leaves behind: the backbone, its tokenizer, and a record of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from run_folder import log_without_times, write_json
from transformers import PreTrainedTokenizerFast, Trainer


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
