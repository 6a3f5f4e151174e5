"""Visual tokens after the text of an encoder: their embedding, task prompts before the text, and the joint input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..tasks import TaskModule
from ..values import shown
from .float32_heads import check_mask

__all__ = [
    "VISUAL_INPUTS",
    "JointInput",
    "JointOutput",
    "TaskPrompts",
    "VisualEmbedding",
    "VisualTokens",
    "joint_mask",
    "pool_visual",
    "prompts_of",
]

VISUAL_INPUTS = ("visual_features", "visual_boxes", "visual_mask", "image_ids")
# Boxes are fractions of the image; rounding may put a corner this far outside.
BOX_TOLERANCE = 1e-3


@dataclass
class JointOutput(BaseModelOutput):
    """What an encoder of prompts, text and visual tokens returns: its states and their mask.

    Args:
        attention_mask: (B, P + S + V), False = padding, for the decoder's cross-attention.
    """

    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class JointInput:
    """The parts of an encoder's input, in their order.

    Args:
        prompts: (B, P, d), or None.
        text: the word embeddings (B, S, d).
        visual: the visual tokens (B, V, d).
        mask: (B, P + S + V), False = padding.
        images: (B, V) which image a visual token belongs to; None: all belong to one.
    """

    prompts: Tensor | None
    text: Tensor
    visual: Tensor
    mask: Tensor
    images: Tensor | None

    @property
    def leading(self) -> int:
        """P + S, the tokens before the visual ones."""
        return self.mask.shape[1] - self.visual.shape[1]

    @property
    def segment_ids(self) -> Tensor:
        """(B, P + S + V): 0 for prompts and text, 1 + the image for visual tokens.

        A recurrence along the tokens treats the text and each image as separate sequences.
        """
        images = self.mask.new_zeros(self.visual.shape[:2], dtype=torch.long) if self.images is None else self.images
        text = images.new_zeros(len(images), self.leading)
        return torch.cat((text, images + 1), dim=1)


class VisualEmbedding(nn.Module):
    """Features and boxes of image regions, grid cells or frames as tokens.

        token = norm(W_f features) + norm(W_b [box, area]) + image order + object order

    or with one norm of the whole sum, as configured. The area of a box (b0, b1, b2,
    b3) is (b3 - b2) (b1 - b0), as in the original, although boxes are stored as x1, y1, x2, y2. The object-order
    embeddings belong to the token table and are given, so that a copy of this module trains no copy of the table.

    Args:
        config: a configuration with the fields of `VisualTokenOptions`.
        norm: makes the norm of a width: that of the text model.
    """

    def __init__(self, config: Any, norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        width, separate = config.d_model, config.visual_norm == "separate"
        self.feat_embedding = nn.Sequential(
            nn.Linear(config.visual_feature_dim, width), *((norm(width),) if separate else ())
        )
        self.absolute_vis_pos_embedding = nn.Sequential(
            nn.Linear(5, width), *((norm(width),) if separate else ())
        )  # x1, y1, x2, y2, area
        self.img_order_embedding = nn.Embedding(config.num_images, width) if config.use_order_embeddings else None
        self.layer_norm = norm(width) if config.visual_norm == "joint" else None

    def forward(
        self, features: Tensor, boxes: Tensor, images: Tensor | None = None, object_order: Tensor | None = None
    ) -> Tensor:
        """Embed (B, V, D).

        Args:
            features: (B, V, D).
            boxes: (B, V, 4), fractions of the image.
            images: (B, V), the number of the image; None: all are of image 0.
            object_order: (B, V, d) or (1, V, d), the object-order embeddings.

        Returns:
            (B, V, d).
        """
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
        places = torch.cat((boxes, area.unsqueeze(-1)), dim=-1).to(features.dtype)
        tokens = self.feat_embedding(features) + self.absolute_vis_pos_embedding(places)
        if self.img_order_embedding is not None:
            if images is None:
                images = torch.zeros(features.shape[1], dtype=torch.long, device=features.device)
            tokens = tokens + self.img_order_embedding(images)
        if object_order is not None:
            tokens = tokens + object_order
        return tokens if self.layer_norm is None else self.layer_norm(tokens)


class Prompt(nn.Module):
    """Learnable vectors W_2 tanh(W_1 e) of one embedding e per place (prompt tuning, reparameterised).

    Args:
        length: vectors (P).
        width: of each (d).
        inner_width: between the two layers.
    """

    def __init__(self, length: int, width: int, inner_width: int):
        super().__init__()
        self.embedding = nn.Embedding(length, width)
        self.inner = nn.Linear(width, inner_width)
        self.outer = nn.Linear(inner_width, width)

    def forward(self, text: Tensor) -> Tensor:
        """The vectors for every row of the word embeddings (B, S, d): (B, P, d)."""
        prompts = self.outer(torch.tanh(self.inner(self.embedding.weight)))
        return prompts.to(text.dtype).unsqueeze(0).expand(len(text), -1, -1)


class TaskPrompts(nn.Module, TaskModule):
    """A `Prompt` per task; `set_task` chooses.

    Args:
        tasks: their names.
        length: see `Prompt`.
        width: see `Prompt`.
        inner_width: see `Prompt`.
    """

    def __init__(self, tasks: list[str], length: int, width: int, inner_width: int):
        super().__init__()
        self.task_names = tuple(tasks)
        self.prompts = nn.ModuleDict({task: Prompt(length, width, inner_width) for task in tasks})

    def forward(self, text: Tensor) -> Tensor:
        """The vectors of the active task, see `Prompt.forward`.

        Raises:
            ValueError: no task was set.
        """
        if self.task is None:
            raise ValueError(
                f"the prompts of this model depend on the task: set_task(model, one of {self.task_names})"
            )
        return self.prompts[self.task](text)


def prompts_of(config: Any, length: int) -> nn.Module:
    """One `Prompt` for all tasks, or `TaskPrompts`, as a configuration says.

    Args:
        config: a configuration with the fields of `VisualTokenOptions`.
        length: vectors.
    """
    sizes = length, config.d_model, config.prompt_width
    return Prompt(*sizes) if config.prompt_tasks is None else TaskPrompts(config.prompt_tasks, *sizes)


class VisualTokens:
    """Mixin that adds visual tokens after the text and prompts before it to a text encoder.

    Its modules are `visual_embedding` and, where the configuration asks for prompts, `task_prompts`; peft's
    `modules_to_save` takes either name.
    """

    config: Any
    embed_tokens: Any

    def add_visual_tokens(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        """Create the modules on this encoder.

        Args:
            norm: makes the text model's norm of a width.
        """
        config = self.config
        self.visual_embedding = VisualEmbedding(config, norm)
        if config.prompt_length:
            self.task_prompts = prompts_of(config, config.prompt_length)

    def join(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        visual_features: Tensor | None,
        visual_boxes: Tensor | None,
        visual_mask: Tensor | None,
        image_ids: Tensor | None,
    ) -> JointInput:
        """Prompts, text and visual tokens as the encoder's input.

        Args:
            input_ids: (B, S), or `inputs_embeds` (B, S, d) in their place.
            attention_mask: (B, S), 0 = padding; None: from the padding token.
            inputs_embeds: see `input_ids`.
            visual_features: (B, V, D).
            visual_boxes: (B, V, 4) fractions of the image; None: zeros, for grid cells and frames.
            visual_mask: (B, V), 0 = padding; None: all.
            image_ids: (B, V) which image of the example a token is of; None: there is one.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, the visual inputs are missing or
                of another shape, boxes lie outside the image, or an image or object has no order embedding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = text.new_ones(text.shape[:2]) if input_ids is None else input_ids != self._padding_id
        features, boxes, images = self._checked(text, visual_features, visual_boxes, visual_mask, image_ids)
        if self.config.visual_pooling is not None:
            features, boxes, images, visual_mask = pool_visual(
                features,
                boxes,
                images,
                visual_mask,
                tokens=self.config.pooled_tokens,
                grid=self.config.visual_pooling == "grid",
            )
        order = self._object_order(features, images, visual_mask, text) if self.config.use_order_embeddings else None
        visual = self.visual_embedding(features.to(text.dtype), boxes, images, order)
        return JointInput(
            self.task_prompts(text) if self.config.prompt_length else None,
            text,
            visual,
            joint_mask(attention_mask, visual_mask, visual.shape[1], prompts=self.config.prompt_length),
            images,
        )

    @property
    def _padding_id(self) -> Any:
        return self.config.pad_token_id

    def _checked(
        self,
        text: Tensor,
        features: Tensor | None,
        boxes: Tensor | None,
        mask: Tensor | None,
        images: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        config, batch = self.config, text.shape[0]
        if features is None:
            raise ValueError(f"{type(self).__name__} reads visual tokens after the text: pass visual_features")
        if features.dim() != 3 or (features.shape[0], features.shape[2]) != (batch, config.visual_feature_dim):
            raise ValueError(
                f"visual_features must be (batch, tokens, visual_feature_dim) = ({batch}, V, "
                f"{config.visual_feature_dim}), not {tuple(features.shape)}"
            )
        if boxes is None:
            boxes = features.new_zeros(*features.shape[:2], 4)
        rows = tuple(features.shape[:2])
        for name, tensor, shape in (
            ("visual_boxes", boxes, (*rows, 4)),
            ("visual_mask", mask, rows),
            ("image_ids", images, rows),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")
        if torch.compiler.is_compiling() or features.is_meta:
            return features, boxes, images
        if boxes.numel() and not bool(((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all()):
            outside = boxes[((boxes < -BOX_TOLERANCE) | (boxes > 1 + BOX_TOLERANCE) | boxes.isnan()).any(-1)][0]
            raise ValueError(
                f"visual_boxes hold {shown(outside.tolist())}, outside the image: divide x1, y1, x2, y2 by its width "
                "and height"
            )
        if (
            images is not None
            and images.numel()
            and not 0 <= int(images.min()) <= int(images.max()) < config.num_images
        ):
            raise ValueError(
                f"image_ids from {int(images.min())} to {int(images.max())}, but an example may have num_images="
                f"{config.num_images} images, counted from 0"
            )
        return features, boxes, images

    def _object_order(self, features: Tensor, images: Tensor | None, mask: Tensor | None, text: Tensor) -> Tensor:
        """The embedding of each token's place within its image, from the end of the token table: (B or 1, V, d)."""
        length, table, limit = features.shape[1], self.embed_tokens, self.config.max_objects
        if images is None:
            places, most = torch.arange(length, device=features.device).unsqueeze(0), length
        else:
            member = nn.functional.one_hot(images, self.config.num_images)  # (B, V, images)
            if mask is not None:  # padding belongs to no image
                member = member * mask.to(member.device).ne(0).unsqueeze(-1)
            places = (member.cumsum(1) - member).gather(-1, images.unsqueeze(-1)).squeeze(-1)
            small = length <= limit or torch.compiler.is_compiling() or places.is_meta
            most = 0 if small else int(member.sum(1).max())
        if most > limit:
            raise ValueError(
                f"an image of {most} visual tokens, but the model has order embeddings for max_objects={limit}: give "
                "fewer, or pool them (visual_pooling)"
            )
        rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
        embedded = table(rows - 1 - places.clamp(max=limit - 1))
        return (embedded / getattr(table, "embed_scale", 1.0)).to(text.dtype)


def joint_mask(attention_mask: Tensor, visual_mask: Tensor | None, visual_tokens: int, *, prompts: int = 0) -> Tensor:
    """The mask of prompts, text and visual tokens, as booleans.

    Args:
        attention_mask: (B, S), 0 = padding.
        visual_mask: (B, V), 0 = padding; None: all.
        visual_tokens: V.
        prompts: P.

    Returns:
        (B, P + S + V).

    Raises:
        ValueError: (on the CPU) one is a mask to be added, in which 0 is a token.
    """
    check_mask("attention_mask", attention_mask)
    words = attention_mask.ne(0)
    if visual_mask is None:
        visual = words.new_ones(len(words), visual_tokens)
    else:
        check_mask("visual_mask", visual_mask)
        visual = visual_mask.to(words.device).ne(0)
    return torch.cat((words.new_ones(len(words), prompts), words, visual), dim=1)


def pool_visual(
    features: Tensor,
    boxes: Tensor,
    images: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    tokens: int,
    grid: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Max-pools the tokens of each image over neighbouring cells of a grid, or along a sequence.

    Boxes, image numbers and masks of the first tokens are kept; in a grid they are all alike.

    Args:
        features: (B, V, D); of several images, one after the other with equally many tokens.
        boxes: (B, V, 4).
        images: (B, V) or None.
        mask: (B, V) or None.
        tokens: tokens per image after pooling, a square number for a grid.
        grid: whether an image's tokens are the rows of a square grid.

    Returns:
        Features, boxes, images and mask, with images x `tokens` in place of V.

    Raises:
        ValueError: the tokens of an image are not a square grid or too few, or images have different numbers of them.
    """
    batch, length, width = features.shape
    each = length
    if images is not None:
        each = int((images[0] == images[0, 0]).sum())
        expected = images[:, ::each].repeat_interleave(each, dim=1)[:, :length]
        if length % each or not bool(expected.eq(images).all()):
            raise ValueError(
                f"image_ids {shown(images[0].tolist())}: pooling needs equally many tokens for each image"
            )
    if tokens > each:
        raise ValueError(f"pooled_tokens={tokens}, but an image has no more than {each} visual tokens")
    side = round(each**0.5)
    if grid and side * side != each:
        raise ValueError(f"visual_pooling='grid': the {each} visual tokens of an image are not a square grid")
    cells = features.reshape(-1, each, width).transpose(1, 2)
    if grid:
        pooled = nn.functional.adaptive_max_pool2d(cells.unflatten(2, (side, side)), round(tokens**0.5)).flatten(2)
    else:
        pooled = nn.functional.adaptive_max_pool1d(cells, tokens)
    features = pooled.transpose(1, 2).reshape(batch, -1, width)

    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.unflatten(1, (-1, each))[:, :, :tokens].flatten(1, 2)

    kept = first(boxes)
    assert kept is not None
    return features, kept, first(images), first(mask)
