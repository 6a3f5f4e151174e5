"""READConfig: which modules READ adapts, how wide it is, and which recurrence it has."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from peft.utils import PeftType

from ..peft_methods import AdapterConfig
from ..peft_methods.configuration import check_json, check_pattern, checked_positive
from ..plain import plain_flag, plain_integers
from ..recurrence import CELLS

__all__ = ["READConfig"]


@dataclass
class READConfig(AdapterConfig):
    """The configuration of READ, the recurrent adapter of READ-PVLA (arXiv 2312.06950, equation 5).

    The output O (B, T, d) of a feed-forward block becomes O + GELU(RNN(O W_down)) W_up, with W_down d×r and W_up r×d.

    Args:
        r: the width k of the bottleneck and of the recurrence.
        cell: "rnn", "gru" or "lstm"; "none" leaves the bottleneck adapter without a recurrence.
        target_modules: names or a regular expression of the modules to adapt, or "all-linear"; the last linear layer
            of each feed-forward block of the usual architectures if absent.
        exclude_modules: names or a regular expression of modules not to adapt.
        layers_to_transform: the indices of the layers to adapt; needs a list of target modules.
        layers_pattern: the name of the module list that the indices refer to.
        modules_to_save: modules apart from the adapter that are trained and saved as a whole.
        trainable_token_indices: ids of tokens whose input embeddings are trained too, or such ids by the name of an
            embedding module; only these rows are trained and saved. Tied output embeddings follow.
        rank_pattern: another r for the modules whose name ends with a key (a regular expression).
        cell_pattern: another cell for the modules whose name ends with a key (a regular expression). If absent, the
            model type may bring one: the decoder of `moment_detr` has no recurrence, since its queries are unordered.
        dropout: the probability of dropping an entry of GELU(h), before W_up.
        use_bias: biases in W_down, the recurrence and W_up; False is exactly equation (5).
        bidirectional: one cell of width r/2 in each direction of time, for encoders only.
        batch_first: whether the adapted modules see (B, T, d); False for (T, B, d).
        init_weights: True makes the adapter the identity (W_up zero); False makes W_up random too. "paper" is the
            paper's initialisation, W_up and the recurrence zero, with which nothing can be trained.
        pvla: the settings of the alignment loss that the adapter was trained with, if any. A record for the model
            card; the adapter itself does not use it.

    Numbers of numpy and torch are converted to Python's, so that the configuration can be saved.

    Raises:
        ValueError: if a value is not one of those above.
    """

    card_title: ClassVar[str] = "READ adapter"
    card_tags: ClassVar[tuple[str, ...]] = ("read", "peft-read", "arxiv:2312.06950")
    card_text: ClassVar[str] = (
        "A recurrent adapter (READ, [arXiv 2312.06950](https://arxiv.org/abs/2312.06950)): the output O of each "
        "adapted module\nbecomes O + GELU(RNN(O W_down)) W_up, with the base model frozen."
    )

    r: int = field(default=4, metadata={"help": "The width k of the bottleneck and of the recurrence."})
    cell: str = field(default="rnn", metadata={"help": "The recurrence: 'rnn', 'gru', 'lstm', or 'none'."})
    target_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045 - read by argument parsers
        default=None,
        metadata={
            "help": (
                "List of module names or regular expression of the module names to adapt, for example ['fc2'], or "
                "'all-linear'. If not specified, the last linear layer of each feed-forward block is chosen by the "
                "model's architecture; an unknown architecture is an error."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "List of module names or regular expression of the modules not to adapt."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(  # noqa: UP007, UP045
        default=None, metadata={"help": "The index or the indices of the layers to adapt."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "The name of the module list that `layers_to_transform` counts, often 'layers' or 'h'."},
    )
    modules_to_save: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Modules apart from READ's layers that are trained and saved as a whole."}
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={"help": "Ids of tokens whose embeddings are trained too; or such ids by embedding module."},
    )
    rank_pattern: Optional[dict[str, int]] = field(  # noqa: UP045
        default=None, metadata={"help": "Module name or regular expression -> a rank other than `r`."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on GELU(h), before the up projection."})
    use_bias: bool = field(default=True, metadata={"help": "Biases in down projection, recurrence and up projection."})
    bidirectional: bool = field(
        default=False, metadata={"help": "One cell of width r/2 in each direction of time; encoders only."}
    )
    batch_first: bool = field(
        default=True, metadata={"help": "Whether the adapted modules see (batch, tokens, width)."}
    )
    init_weights: Union[bool, str] = field(  # noqa: UP007
        default=True,
        metadata={
            "help": (
                "True: the adapter starts as the identity. False: W_up is random too. 'paper': W_up and the "
                "recurrence are zero, as in the paper, which cannot be trained."
            )
        },
    )
    cell_pattern: Optional[dict[str, str]] = field(  # noqa: UP045
        default=None, metadata={"help": "Module name or regular expression -> a cell other than `cell`."}
    )
    pvla: Optional[dict[str, Any]] = field(  # noqa: UP045
        default=None, metadata={"help": "A record of the alignment loss used in training, for the model card."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.READ  # type: ignore[attr-defined]
        self._check_modules()
        self._check_layers()
        self._check_numbers()
        self._check_ranks_and_cells()
        if self.trainable_token_indices is not None:
            self._check_tokens()
        if self.pvla is not None:
            self._check_record()
        if self.init_weights == "paper" and not self.inference_mode:
            warnings.warn(
                "init_weights='paper' sets the recurrence and W_up to zero: every gradient but that of W_up's bias "
                "is exactly zero and stays so, and the adapter cannot be trained. Use init_weights=True.",
                stacklevel=3,
            )

    def _check_numbers(self) -> None:
        self._check_dropout()
        for name in ("use_bias", "bidirectional", "batch_first"):
            setattr(self, name, plain_flag(name, getattr(self, name)))
        if self.init_weights != "paper":
            try:
                self.init_weights = plain_flag("init_weights", self.init_weights)
            except ValueError as error:
                raise ValueError(f"`init_weights` is True, False or 'paper', got {self.init_weights!r}.") from error

    def _check_ranks_and_cells(self) -> None:
        for name in ("rank_pattern", "cell_pattern"):
            patterns = getattr(self, name)
            if patterns is None:
                continue
            if not isinstance(patterns, dict):
                raise ValueError(f"`{name}` maps names of modules to values, got {patterns!r}.")
            for pattern in patterns:
                check_pattern(f"{name}[{pattern!r}]", pattern)
        self.r = checked_positive("r", self.r)
        if self.rank_pattern is not None:
            self.rank_pattern = {k: checked_positive(f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()}
        for origin, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.ranks.items()}}.items():
            if self.bidirectional and rank % 2:
                raise ValueError(f"bidirectional=True gives each direction r/2 numbers; `{origin}`={rank} is odd.")
        for origin, cell in {
            "cell": self.cell,
            **{f"cell_pattern[{k!r}]": v for k, v in (self.cell_pattern or {}).items()},
        }.items():
            if not isinstance(cell, str) or cell not in CELLS:
                raise ValueError(f"`{origin}` should be one of {', '.join(map(repr, CELLS))}, got {cell!r}.")

    def _check_tokens(self) -> None:
        tokens: Any = self.trainable_token_indices
        if isinstance(tokens, dict):
            for name in tokens:
                check_pattern("trainable_token_indices", name)
            self.trainable_token_indices = {
                name: _token_ids(f"trainable_token_indices[{name!r}]", ids) for name, ids in tokens.items()
            }
        else:
            self.trainable_token_indices = _token_ids("trainable_token_indices", tokens)

    def _check_record(self) -> None:
        if not isinstance(self.pvla, dict):
            raise ValueError(f"`pvla` is the record of the alignment loss, a dict, got {self.pvla!r}.")
        for key, value in self.pvla.items():
            check_json(f"pvla[{key!r}]", value)

    @property
    def ranks(self) -> dict[str, int]:
        """`rank_pattern`, empty where there is none."""
        return self.rank_pattern or {}

    def card_facts(self) -> dict[str, str]:
        """The rows of the model card that tell the width and the recurrence."""
        return {
            "r": str(self.r),
            "cell": self.cell + (", bidirectional" if self.bidirectional else ""),
            "biases": "yes" if self.use_bias else "no",
        }


def _token_ids(origin: str, ids: Any) -> list[int]:
    tokens = plain_integers(origin, ids)
    if not tokens:
        raise ValueError(f"`{origin}` is empty; leave it out to train no embedding.")
    if len(set(tokens)) != len(tokens) or min(tokens) < 0:
        wrong = next(token for token in tokens if token < 0 or tokens.count(token) > 1)
        raise ValueError(f"`{origin}` holds ids of tokens, non-negative and without duplicates; {wrong} is not.")
    return tokens
