"""The configuration fields of text encoder-decoders that read visual tokens after the text: VL-BART and VL-T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plain import plain_flag, plain_integer, plain_names
from .text_configuration import FIELDS_OF_THE_CLASS, FromTextConfig

__all__ = ["VisualTokenOptions"]

VISUAL_NORMS = ("separate", "joint", None)
VISUAL_POOLINGS = (None, "grid", "sequence")
# The name in the original (Sung et al., 2022), and the default there.
_FLAGS = {
    "use_vis_order_embedding": True,
    "use_vis_layer_norm": True,
    "individual_vis_layer_norm": True,
    "share_vis_lang_layer_norm": False,
    "downsample": False,
    "oneddownsample": False,
}
_RENAMED: dict[str, str] = {"feat_dim": "visual_feature_dim", "n_images": "num_images"}
# Settings of the original that describe what is added to a model, or its data.
_NOT_THE_BACKBONE = frozenset({"vocab_size", "vocab_size_after_resize", "n_boxes", "pos_dim", "reduction_factor"}) | {
    "add_adapter_cross_attn",
    "use_adapter",
    "use_compacter",
    "use_hyperformer",
    "use_lradapter",
    "use_lora",
    "use_lm_head_adapter",
}
_UNSUPPORTED = ("vis_use_transformer", "expand_vis_embedding", "sparse_sample")


class VisualTokenOptions(FromTextConfig):
    """Fields added to a text configuration; a mixin for `VLBartConfig` and `VLT5Config`.

    Source: Cho et al., "Unifying Vision-and-Language Tasks via Text Generation", ICML 2021, section 3; Sung et al.,
    "VL-Adapter", CVPR 2022, section 3.1, whose settings are the defaults.
    """

    def set_visual_tokens(
        self,
        *,
        vocab_size: int,
        visual_feature_dim: int,
        num_images: int,
        max_objects: int | None,
        use_order_embeddings: bool,
        visual_norm: str | None,
        share_embedding_norm: bool,
        visual_pooling: str | None,
        pooled_tokens: int,
        prompt_length: int,
        prompt_width: int,
        prompt_tasks: list[str] | None,
        decoder_prompt_length: int = 0,
    ) -> None:
        """Check the fields against each other and store them.

        Args:
            vocab_size: rows of the token table.
            visual_feature_dim: width of the features of one visual token.
            num_images: how many images an example may have (rows of the image-order embedding).
            max_objects: how many tokens an image may have: the object-order embeddings are the last rows of the token
                table. None: 100, or every row of a smaller table.
            use_order_embeddings: whether image and object order are embedded.
            visual_norm: `"separate"` norms for features and boxes, a `"joint"` norm of their sum, or None.
            share_embedding_norm: whether visual tokens pass through the norm of the text embeddings too.
            visual_pooling: `"grid"`: the tokens of an image are a square, max-pooled to `pooled_tokens`;
                `"sequence"`: they are a sequence, max-pooled to `pooled_tokens`; None: they are left as they are.
            pooled_tokens: see `visual_pooling`.
            prompt_length: learnable vectors before the text (P); 0 for none.
            prompt_width: hidden width of the MLP that computes them.
            prompt_tasks: the tasks that have prompts of their own; None: one set for all.
            decoder_prompt_length: learnable vectors before the decoder's tokens; 0 for none.

        Raises:
            ValueError: a value is not allowed, or two values contradict each other.
        """
        for name, value, low in (
            ("visual_feature_dim", visual_feature_dim, 1),
            ("num_images", num_images, 1),
            ("pooled_tokens", pooled_tokens, 1),
            ("prompt_length", prompt_length, 0),
            ("prompt_width", prompt_width, 1),
            ("decoder_prompt_length", decoder_prompt_length, 0),
        ):
            if plain_integer(name, value) < low:
                raise ValueError(f"{name}={value} must be at least {low}")
        max_objects = min(100, vocab_size) if max_objects is None else plain_integer("max_objects", max_objects)
        if not 1 <= max_objects <= vocab_size:
            raise ValueError(
                f"max_objects={max_objects}: the order of objects is embedded by the last rows of the token table, "
                f"which has {vocab_size}"
            )
        if visual_norm not in VISUAL_NORMS:
            raise ValueError(f"visual_norm={visual_norm!r} is not one of {VISUAL_NORMS}")
        if visual_pooling not in VISUAL_POOLINGS:
            raise ValueError(f"visual_pooling={visual_pooling!r} is not one of {VISUAL_POOLINGS}")
        if visual_pooling == "grid" and round(pooled_tokens**0.5) ** 2 != pooled_tokens:
            raise ValueError(f"pooled_tokens={pooled_tokens} is not a square number, which a grid is pooled to")
        if prompt_tasks is not None:
            prompt_tasks = plain_names("prompt_tasks", prompt_tasks)
            if not prompt_tasks or len(set(prompt_tasks)) < len(prompt_tasks) or any("." in t for t in prompt_tasks):
                raise ValueError(f"prompt_tasks={prompt_tasks} must be different names without a dot, at least one")
            if not prompt_length and not decoder_prompt_length:
                raise ValueError(f"prompt_tasks={prompt_tasks} need a prompt_length above 0")
        self.visual_feature_dim = plain_integer("visual_feature_dim", visual_feature_dim)
        self.num_images = plain_integer("num_images", num_images)
        self.max_objects = max_objects
        self.use_order_embeddings = plain_flag("use_order_embeddings", use_order_embeddings)
        self.visual_norm = visual_norm
        self.share_embedding_norm = plain_flag("share_embedding_norm", share_embedding_norm)
        self.visual_pooling = visual_pooling
        self.pooled_tokens = plain_integer("pooled_tokens", pooled_tokens)
        self.prompt_length = plain_integer("prompt_length", prompt_length)
        self.prompt_width = plain_integer("prompt_width", prompt_width)
        self.prompt_tasks = prompt_tasks
        self.decoder_prompt_length = plain_integer("decoder_prompt_length", decoder_prompt_length)

    @classmethod
    def from_original_options(cls, options: Mapping[str, Any], **added: Any) -> Any:
        """The backbone's configuration from the options of the original implementation.

        What is added to the backbone, such as adapters and prompts, is left out.

        Args:
            options: the settings by their original names, or a mapping that holds them as `"config"`.
            **added: fields of the configuration beside those of the backbone.

        Raises:
            ValueError: a setting asks for something that is not part of these backbones.
        """
        original: dict[str, Any] = dict(options.get("config", options))
        for name in _UNSUPPORTED:
            if original.pop(name, None):
                raise ValueError(f"{name}=True of the original is not part of {cls.__name__}")
        if original.get("pos_dim", 4) != 4:
            raise ValueError(f"pos_dim={original['pos_dim']}: boxes have 4 numbers")
        flags = {name: original.pop(name, default) for name, default in _FLAGS.items()}
        norm = "separate" if flags["individual_vis_layer_norm"] else "joint"
        vocabulary = original.get("vocab_size_after_resize") or original["vocab_size"]
        pooling = "sequence" if flags["oneddownsample"] else "grid" if flags["downsample"] else None
        fields: dict[str, Any] = {
            _RENAMED.get(name, name): value
            for name, value in original.items()
            if name not in FIELDS_OF_THE_CLASS | _NOT_THE_BACKBONE
        }
        tokens = original.get("n_boxes", 36)
        fields |= {
            "vocab_size": vocabulary,
            "use_order_embeddings": flags["use_vis_order_embedding"],
            "visual_norm": norm if flags["use_vis_layer_norm"] else None,
            "share_embedding_norm": flags["share_vis_lang_layer_norm"],
            "visual_pooling": pooling,
            "pooled_tokens": int(tokens**0.5) ** 2 if pooling == "grid" else tokens,
        }
        return cls(**fields, **added)
