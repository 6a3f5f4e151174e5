"""The configurations of the bottleneck family: Bottleneck, Compacter, Hyperformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional, Union

from peft.utils import PeftType
from transformers.activations import ACT2FN

from ..peft_methods import AdapterConfig
from ..peft_methods.configuration import checked_positive
from ..plain import plain_flag, plain_names

__all__ = ["SHARES", "BottleneckConfig", "CompacterConfig", "HyperformerConfig"]

SHARES = (None, "all", "down", "up")


@dataclass
class BottleneckConfig(AdapterConfig):
    """The configuration of the bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751).

    The output y (..., d) of a linear module becomes y + Up(act(Down(y))), with Down: d -> r and Up: r -> d, both with
    biases.

    Args:
        r: the width of the bottleneck; d // `reduction_factor` if absent.
        reduction_factor: how many times narrower than d the bottleneck is.
        activation: the name of one of transformers' activations.
        target_modules: names or a regular expression of the modules to adapt, or one of the keywords below. If absent,
            the last linear layer of every attention and every feed-forward block (Houlsby's positions);
            "feed_forward" (Pfeiffer's) or "attention": those of one kind; "language", "vision", "audio", "all": those
            of that part of a multimodal model; "all-linear": every linear layer.
        exclude_modules: names or a regular expression of modules not to adapt.
        layers_to_transform: the indices of the layers to adapt; needs a list of target modules, or none.
        layers_pattern: the name of the module list that the indices refer to.
        modules_to_save: modules apart from the adapter that are trained and saved as a whole.
        dropout: the probability of dropping an entry of act(Down(y)).
        norm_before: a LayerNorm before Down, one per position, shared by the tasks.
        norm_after: a LayerNorm after Up, one per position, shared by the tasks.
        init_weights: True makes the adapter the identity (Up zero, or the norm after it); False makes both random;
            "original" is that of VL-Adapter's implementation (arXiv 2112.06825): N(0, s) if the base model's
            configuration has a standard deviation s (BART: `init_std`), else torch's defaults (T5).
        low_rank: the rank of Down and Up, each a product of two matrices; full if absent.
        tasks: the names of the tasks that the adapter serves; `set_task` chooses the one of the next forward passes.
        share: weights that all tasks share: None, "all", or half of them, "down" or "up".

    Raises:
        ValueError: if a value is not one of those above.
    """

    peft_name: ClassVar[str] = "BOTTLENECK"
    card_title: ClassVar[str] = "Bottleneck adapter"
    card_tags: ClassVar[tuple[str, ...]] = ("bottleneck-adapter", "peft-read", "arxiv:1902.00751")
    card_text: ClassVar[str] = (
        "A bottleneck adapter ([arXiv 1902.00751](https://arxiv.org/abs/1902.00751)): the output y of each adapted "
        "module\nbecomes y + Up(act(Down(y))), with the base model frozen."
    )

    r: Optional[int] = field(  # noqa: UP045 - read by argument parsers
        default=None, metadata={"help": "The width of the bottleneck; d // reduction_factor if absent."}
    )
    reduction_factor: int = field(default=8, metadata={"help": "How many times narrower than d the bottleneck is."})
    activation: str = field(default="gelu_new", metadata={"help": "The name of an activation of transformers."})
    target_modules: Optional[Union[list[str], str]] = field(  # noqa: UP007, UP045
        default=None,
        metadata={
            "help": (
                "List of module names or regular expression of the module names to adapt. If not specified, the last "
                "linear layer of each attention and feed-forward block; 'feed_forward' or 'attention' for one kind."
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
        default=None, metadata={"help": "Modules apart from the adapter that are trained and saved as a whole."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on act(Down(y)), before Up."})
    norm_before: bool = field(default=False, metadata={"help": "A LayerNorm before Down."})
    norm_after: bool = field(default=False, metadata={"help": "A LayerNorm after Up."})
    init_weights: Union[bool, str] = field(  # noqa: UP007
        default=True,
        metadata={"help": "True: the identity. False: random. 'original': as in VL-Adapter's implementation."},
    )
    low_rank: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "The rank of Down and Up; full if absent."}
    )
    tasks: Optional[list[str]] = field(  # noqa: UP045
        default=None, metadata={"help": "The tasks that the adapter serves, chosen by `set_task`."}
    )
    share: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "Weights that all tasks share: none, 'all', 'down' or 'up'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.peft_name]
        self._check_modules()
        self._check_layers()
        self._check_dropout()
        if self.r is not None:
            self.r = checked_positive("r", self.r)
        self.reduction_factor = checked_positive("reduction_factor", self.reduction_factor)
        for name in ("norm_before", "norm_after"):
            setattr(self, name, plain_flag(name, getattr(self, name)))
        if not isinstance(self.activation, str) or self.activation not in ACT2FN:
            raise ValueError(f"`activation` should be one of {', '.join(sorted(ACT2FN))}, got {self.activation!r}.")
        if self.init_weights != "original":
            try:
                self.init_weights = plain_flag("init_weights", self.init_weights)
            except ValueError as error:
                raise ValueError(f"`init_weights` is True, False or 'original', got {self.init_weights!r}.") from error
        if self.low_rank is not None:
            self.low_rank = checked_positive("low_rank", self.low_rank)
        self._check_tasks()

    def _check_tasks(self) -> None:
        if self.tasks is not None:
            self.tasks = plain_names("tasks", self.tasks)
            if not self.tasks:
                raise ValueError("`tasks` is empty; leave it out for an adapter that knows no tasks.")
            for task in self.tasks:
                if "." in task:
                    raise ValueError(f"`tasks` contains {task!r}: the name of a task is a part of names of weights.")
                if self.tasks.count(task) > 1:
                    raise ValueError(f"`tasks` contains {task!r} twice.")
        if self.share not in SHARES:
            raise ValueError(f"`share` should be one of {', '.join(map(repr, SHARES))}, got {self.share!r}.")
        if self.share is not None and self.tasks is None:
            raise ValueError(f"share={self.share!r} says what tasks share; name them in `tasks`.")

    def tasks_apart(self, half: str) -> list[str]:
        """The tasks with separate weights in a half of the adapter, "down" or "up"; none if it is shared."""
        return [] if self.tasks is None or self.share in ("all", half) else self.tasks

    def width(self, d: int, path: str) -> int:
        """The width of the bottleneck of a module.

        Args:
            d: the width of the module's output.
            path: the module's path, for the message.

        Raises:
            ValueError: it would be 0, or larger than d.
        """
        width = self.r if self.r is not None else d // self.reduction_factor
        if width < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck of {path!r}, whose output has width "
                f"{d}; lower it, or set `r`."
            )
        if width > d:
            raise ValueError(
                f"r={width} is not a bottleneck of {path!r}, whose output has width {d}; r is at most as large."
            )
        return width

    def card_facts(self) -> dict[str, str]:
        """The rows of the model card that tell the width, the activation and the tasks."""
        facts = {
            "width": str(self.r) if self.r is not None else f"d // {self.reduction_factor}",
            "activation": self.activation,
        }
        norms = [name for name in ("before", "after") if getattr(self, f"norm_{name}")]
        if norms:
            facts["norms"] = " and ".join(norms)
        if self.low_rank is not None:
            facts["rank of Down and Up"] = str(self.low_rank)
        if self.tasks is not None:
            facts["tasks"] = ", ".join(f"`{task}`" for task in self.tasks)
            facts["shared by the tasks"] = self.share or "nothing"
        return facts


@dataclass
class CompacterConfig(BottleneckConfig):
    """The configuration of Compacter (Karimi Mahabadi et al. 2021, arXiv 2106.04647).

    Down and Up are sums of Kronecker products, H = Σ_i A_i ⊗ B_i with n rules A_i (n, n) and n matrices B_i
    (d/n, r/n): y -> y + Up(act(Down(y))) as in `BottleneckConfig`, whose arguments apply here too.

    Args:
        phm_dim: n, which must divide d and r.
        shared_rule: the rules are shared by all products ("model"), by the tasks at each Down and Up ("tasks"), or
            not at all (None).
        factorized_rank: the rank of the B_i, each a product of two matrices; full if absent.

    The published scripts of VL-Adapter have phm_dim=2, shared_rule=None and factorized_rank=None.
    """

    peft_name: ClassVar[str] = "COMPACTER"
    card_title: ClassVar[str] = "Compacter"
    card_tags: ClassVar[tuple[str, ...]] = ("compacter", "peft-read", "arxiv:2106.04647")
    card_text: ClassVar[str] = (
        "Compacter ([arXiv 2106.04647](https://arxiv.org/abs/2106.04647)): the output y of each adapted module\n"
        "becomes y + Up(act(Down(y))), Down and Up sums of Kronecker products, with the base model frozen."
    )

    phm_dim: int = field(default=4, metadata={"help": "The number n of Kronecker products."})
    shared_rule: Optional[str] = field(  # noqa: UP045
        default="model", metadata={"help": "The rules are shared by 'model', by 'tasks', or not at all."}
    )
    factorized_rank: Optional[int] = field(  # noqa: UP045
        default=1, metadata={"help": "The rank of the larger factors; full if absent."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.phm_dim = checked_positive("phm_dim", self.phm_dim)
        if self.shared_rule not in ("model", "tasks", None):
            raise ValueError(f"`shared_rule` should be 'model', 'tasks' or None, got {self.shared_rule!r}.")
        if self.shared_rule == "tasks" and self.tasks is None:
            raise ValueError("shared_rule='tasks' says that tasks share the rules; name them in `tasks`.")
        if self.factorized_rank is not None:
            self.factorized_rank = checked_positive("factorized_rank", self.factorized_rank)
        if self.low_rank is not None:
            raise ValueError("`low_rank` is of the bottleneck adapter; Compacter has `factorized_rank`.")

    def width(self, d: int, path: str) -> int:
        """The width of the bottleneck of a module, which `phm_dim` divides as it does d.

        Raises:
            ValueError: it does not.
        """
        width = super().width(d, path)
        for name, number in (("the output", d), ("the bottleneck", width)):
            if number % self.phm_dim:
                raise ValueError(
                    f"phm_dim={self.phm_dim} does not divide {number}, the width of {name} of {path!r}; choose a "
                    "divisor, or another `r`."
                )
        return width

    def card_facts(self) -> dict[str, str]:
        """The rows of the model card, those of the Kronecker products included."""
        facts = {
            "Kronecker products": str(self.phm_dim),
            "rules shared by": {"model": "the whole model", "tasks": "the tasks", None: "nobody"}[self.shared_rule],
        }
        if self.factorized_rank is not None:
            facts["rank of the larger factors"] = str(self.factorized_rank)
        return {**super().card_facts(), **facts}


@dataclass
class HyperformerConfig(BottleneckConfig):
    """The configuration of Hyperformer (Karimi Mahabadi et al. 2021, arXiv 2106.04489).

    y -> y + Up(act(Down(y))) as in `BottleneckConfig`, whose arguments apply here too, with weights and biases that
    are generated once per forward pass: an embedding of the task and one of the layer go through an MLP and a
    LayerNorm, and linear generators, one pair per kind of position and stack, compute Down and Up, and
    the norms if there are any, from the result.

    Args:
        task_embedding_dim: the width of the embeddings of tasks and layers.
        hidden_dim: the hidden width of the MLP.
        projected_dim: the width of its output, from which everything is generated.
        shared_generator: one pair of generators per stack for all kinds of position, told apart by an embedding of
            the kind (0 feed-forward, 1 self-attention, 2 cross-attention).
    """

    peft_name: ClassVar[str] = "HYPERFORMER"
    card_title: ClassVar[str] = "Hyperformer"
    card_tags: ClassVar[tuple[str, ...]] = ("hyperformer", "peft-read", "arxiv:2106.04489")
    card_text: ClassVar[str] = (
        "Hyperformer ([arXiv 2106.04489](https://arxiv.org/abs/2106.04489)): the output y of each adapted module\n"
        "becomes y + Up(act(Down(y))), with weights generated from embeddings of task and layer; the base model is "
        "frozen."
    )

    task_embedding_dim: int = field(default=512, metadata={"help": "The width of the embeddings."})
    hidden_dim: int = field(default=128, metadata={"help": "The hidden width of the MLP."})
    projected_dim: int = field(default=8, metadata={"help": "The width that everything is generated from."})
    shared_generator: bool = field(
        default=False, metadata={"help": "One pair of generators for all kinds of position."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_embedding_dim", "hidden_dim", "projected_dim"):
            setattr(self, name, checked_positive(name, getattr(self, name)))
        self.shared_generator = plain_flag("shared_generator", self.shared_generator)
        if self.tasks is None:
            raise ValueError("Hyperformer generates the weights of tasks; name them in `tasks`, one at least.")
        for name in ("share", "low_rank"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of the bottleneck adapter; Hyperformer's tasks share its generators.")

    def card_facts(self) -> dict[str, str]:
        """The rows of the model card, those of the hypernetwork included."""
        facts = super().card_facts()
        del facts["shared by the tasks"]
        widths = f"{self.task_embedding_dim}, {self.hidden_dim}, {self.projected_dim}"
        return {
            **facts,
            "embedding, hidden, projected": widths,
            "generators": "one per stack" if self.shared_generator else "one per stack and kind of position",
        }
