"""What VG-BART, VG-T5, VL-BART and VL-T5 share outside their encoders: labels, the loss, and loading weights."""

from __future__ import annotations

import os
from typing import Any, cast

from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput

from .original_checkpoints import Checkpoint, load_original_weights
from .sequence_loss import sequence_cross_entropy
from .vision_guidance import VISUAL_MODULES

__all__ = ["VisualGeneration"]


class VisualGeneration:
    """A mixin for the four conditional-generation classes."""

    plain_config_class: Any
    config_class: Any
    visual_modules: frozenset[str] = VISUAL_MODULES  # which a plain checkpoint lacks; names below the encoder
    # The losses divide by `num_items_in_batch` themselves, so the Trainer need not rescale them.
    accepts_loss_kwargs = True

    def _decoder_inputs(
        self, labels: Tensor | None, decoder_input_ids: Tensor | None, decoder_inputs_embeds: Tensor | None
    ) -> Tensor | None:
        """The decoder's input (B, T): as given, or the shifted labels."""
        if labels is None or decoder_input_ids is not None or decoder_inputs_embeds is not None:
            return decoder_input_ids
        return cast(Any, self).prepare_decoder_input_ids_from_labels(labels)

    @staticmethod
    def _with_loss(
        outputs: Seq2SeqLMOutput, labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Seq2SeqLMOutput:
        """The outputs with the loss of the labels, where there are any."""
        if labels is None:
            return outputs
        loss = sequence_cross_entropy(cast(Tensor, outputs.logits), labels, num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, **outputs)

    @classmethod
    def from_plain_checkpoint(cls, checkpoint: str | os.PathLike, *, config: Any = None, **options: Any) -> Any:
        """Start from a checkpoint of the plain text model; the visual modules are initialised at random.

        Args:
            checkpoint: folder or name of a BART or T5 checkpoint.
            config: the configuration; by default the checkpoint's own with `options` added.
            **options: fields of the configuration, such as `visual_feature_dim`.

        Raises:
            ValueError: both `config` and `options` are given, or a weight of the text model is not in the checkpoint.
        """
        if config is None:
            plain_config = cls.plain_config_class.from_pretrained(checkpoint)
            config = cls.config_class.from_plain_config(plain_config, **options)
        elif options:
            raise ValueError(f"give the fields in config, not beside it: {sorted(options)}")
        load = cast(Any, cls).from_pretrained
        model, report = load(checkpoint, config=config, output_loading_info=True)
        lost = sorted(key for key in report["missing_keys"] if not cls.visual_modules & set(key.split(".")[:3]))
        if lost:
            raise ValueError(f"{checkpoint} is not a checkpoint of the plain text model: it lacks {lost[:5]}")
        return model

    @classmethod
    def from_original_checkpoint(cls, checkpoint: Checkpoint, config: Any) -> Any:
        """Load weights of the original implementation, in evaluation mode.

        Args:
            checkpoint: path or state dict, with or without Lightning's wrapper and its extra `model.` prefix.
            config: the configuration, see `from_original_options`.

        Raises:
            ValueError: the keys do not fit the configuration.
        """
        model = cast(Any, cls)(config)
        load_original_weights(model, checkpoint, prefix="model.", ignored=cls._is_left_out)
        return model.eval()

    @staticmethod
    def _is_left_out(key: str) -> bool:
        # The table of sine positions, and a T5 weight that old checkpoints hold and no version of T5 reads.
        return key.endswith(("img_transformer.pos_encoder.pe", "EncDecAttention.relative_attention_bias.weight"))
