"""Configuration of VL-BART."""

from __future__ import annotations

from typing import Any, cast

from transformers import BartConfig

from ..visual_token_options import VisualTokenOptions

__all__ = ["VLBartConfig"]


class VLBartConfig(VisualTokenOptions, BartConfig):
    """BART whose encoder reads prompts, text and visual tokens; defaults are BART-base.

    Args:
        visual_feature_dim: width of the features of one visual token.
        num_images: how many images an example may have.
        max_objects: how many visual tokens an image may have; None: 100, or every row of a smaller token table.
        use_order_embeddings: whether image and object order are embedded.
        visual_norm: `"separate"` norms of features and boxes, a `"joint"` norm of their sum, or None.
        share_embedding_norm: whether visual tokens pass through the norm of the text embeddings too.
        visual_pooling: `"grid"` or `"sequence"`: each image's tokens are max-pooled to `pooled_tokens`.
        pooled_tokens: see `visual_pooling`.
        prompt_length: learnable vectors before the text; 0 for none.
        prompt_width: hidden width of the MLP that computes them.
        prompt_tasks: tasks with prompts of their own, which `set_task` chooses; None: one set for all.
        decoder_prompt_length: learnable vectors before the decoder's tokens, of the same kind; 0 for none.
        **kwargs: fields of `transformers.BartConfig`.

    Raises:
        ValueError: a field is not allowed (see `VisualTokenOptions.set_visual_tokens`).

    Example:
        >>> VLBartConfig(encoder_layers=2, visual_feature_dim=64, vocab_size=60).max_objects
        60
    """

    model_type = "vl_bart"

    def __init__(
        self,
        visual_feature_dim: int = 2048,
        num_images: int = 2,
        max_objects: int | None = None,
        use_order_embeddings: bool = True,
        visual_norm: str | None = "separate",
        share_embedding_norm: bool = False,
        visual_pooling: str | None = None,
        pooled_tokens: int = 36,
        prompt_length: int = 0,
        prompt_width: int = 800,
        prompt_tasks: list[str] | None = None,
        decoder_prompt_length: int = 0,
        **kwargs: Any,
    ):
        stacks = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {"layers": 6, "ffn_dim": 3072, "attention_heads": 12}.items()
        }
        base = {"d_model": 768, **stacks, "attention_dropout": 0.1, "activation_dropout": 0.1}
        super().__init__(**{**base, **kwargs})
        self.set_visual_tokens(
            vocab_size=cast(int, self.vocab_size),
            visual_feature_dim=visual_feature_dim,
            num_images=num_images,
            max_objects=max_objects,
            use_order_embeddings=use_order_embeddings,
            visual_norm=visual_norm,
            share_embedding_norm=share_embedding_norm,
            visual_pooling=visual_pooling,
            pooled_tokens=pooled_tokens,
            prompt_length=prompt_length,
            prompt_width=prompt_width,
            prompt_tasks=prompt_tasks,
            decoder_prompt_length=decoder_prompt_length,
        )
