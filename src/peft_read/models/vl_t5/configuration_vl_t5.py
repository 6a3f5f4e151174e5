"""Configuration of VL-T5."""

from __future__ import annotations

from typing import Any

from transformers import T5Config

from ..visual_token_options import VisualTokenOptions

__all__ = ["VLT5Config"]


class VLT5Config(VisualTokenOptions, T5Config):
    """T5 whose encoder reads prompts, text and visual tokens; defaults are T5-base.

    Args:
        visual_feature_dim: width of the features of one visual token.
        num_images: how many images an example may have.
        max_objects: how many visual tokens an image may have; None: 100, or every row of a smaller token table.
        use_order_embeddings: whether image and object order are embedded.
        visual_norm: `"separate"` norms of features and boxes, a `"joint"` norm of their sum, or None.
        visual_pooling: `"grid"` or `"sequence"`: each image's tokens are max-pooled to `pooled_tokens`.
        pooled_tokens: see `visual_pooling`.
        prompt_length: learnable vectors before the text; 0 for none.
        prompt_width: hidden width of the MLP that computes them.
        prompt_tasks: tasks with prompts of their own, which `set_task` chooses; None: one set for all.
        share_embedding_norm: False; T5 has no norm of the text embeddings.
        **kwargs: fields of `transformers.T5Config`.

    Raises:
        ValueError: a field is not allowed (see `VisualTokenOptions.set_visual_tokens`).

    Example:
        >>> VLT5Config(d_model=32, num_layers=2, visual_feature_dim=64, vocab_size=60).num_decoder_layers
        2
    """

    model_type = "vl_t5"

    def __init__(
        self,
        visual_feature_dim: int = 2048,
        num_images: int = 2,
        max_objects: int | None = None,
        use_order_embeddings: bool = True,
        visual_norm: str | None = "separate",
        visual_pooling: str | None = None,
        pooled_tokens: int = 36,
        prompt_length: int = 0,
        prompt_width: int = 800,
        prompt_tasks: list[str] | None = None,
        share_embedding_norm: bool = False,
        **kwargs: Any,
    ):
        if share_embedding_norm:
            raise ValueError("share_embedding_norm=True: T5 has no norm of the text embeddings that could be shared")
        base = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0}
        super().__init__(**{**base, **kwargs})
        self.set_visual_tokens(
            vocab_size=self.vocab_size,
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
        )
