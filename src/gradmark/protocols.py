"""The words of gradmark: start reading here.

A network is a function; its gradient at keyed inputs, along keyed directions, is a set of numbers
that the owner can bend by training and nobody else can predict. A :class:`Mark` is a list of
keyed probes; each probe yields one signed number; its sign should equal a key-derived bit.

Shape suffixes used throughout: ``b`` batch, ``C`` classes, ``K`` kernels (directions),
``L`` contrasts (scores), ``n`` bits; ``*shape`` is one input's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs (b, *shape) and integer class labels (b,)."""

Domain = Literal["image", "vector", "signal", "text", "tokens"]
Access = Literal["white", "black"]
Outcome = Literal["owned", "no-evidence", "inconclusive"]
TestName = Literal["sign", "signed-rank", "sign-flip"]
JudgedBy = TestName | Literal["betting"]  # the mark's own test, or the bets of a step-by-step reading


@dataclass(frozen=True)
class ModelSpec:
    """What a mark must know of a model, all of it public.

    ``input_shape`` is one input's shape without the batch: (channels, height, width) for an image,
    (length,) or (channels, length) for a signal, (features,) for a vector. ``low``, ``high`` bound
    legal inputs (None: unbounded); ``levels`` is the number of steps between them that the input
    format can express (255 for 8-bit images; None: continuous). ``scale`` is the amplitude of one
    natural unit: the range for bounded inputs, a typical standard deviation otherwise.
    """

    domain: Domain
    input_shape: tuple[int, ...]
    n_classes: int
    low: float | None = None
    high: float | None = None
    levels: int | None = None
    scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the form that mark files hold: equal specs have equal bytes."""
        bounds = {n: None if b is None else float(b) for n, b in (("low", self.low), ("high", self.high))}
        return {**asdict(self), "input_shape": list(self.input_shape), **bounds, "scale": float(self.scale)}

    def snap(self, x: Tensor) -> Tensor:
        """``x`` moved to the nearest input that the format can express; same shape."""
        if self.low is None or self.high is None:
            return x
        x = x.clamp(self.low, self.high)
        if self.levels is None:
            return x
        unit = (self.high - self.low) / self.levels
        return ((x - self.low) / unit).round() * unit + self.low


@dataclass(frozen=True)
class Reading:
    """What a scheme read in a suspect. It never judges.

    ``values`` (n,): the signed readings, in logits. ``bits`` (n,): the key's bits as +1 or -1.
    ``values * bits > 0`` where the mark is present. ``queries`` counts single inputs sent (0 where
    weights were at hand). ``history``: (queries, values (n,)) after growing query numbers, for a plot; the
    verdict uses ``values``. ``parts``: how many of them belong to each scheme of an ensemble; empty for one.
    """

    values: Tensor
    bits: Tensor
    carriers: int
    queries: int
    access: Access
    history: tuple[tuple[int, Tensor], ...] = ()
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The judge's answer; ``to_json`` is the public interface of ``gradmark verify --json``.

    ``log10_e``, ``evidence``: of a step-by-step reading, log10 of the e-value, and by (queries, log10 e).
    ``queries_allowed``: the budget, by which the parts' shares go. ``reused``: answers from an earlier run.
    ``own_program``: ``modified`` is about the weights, and the suspect's program came with its file.
    """

    outcome: Outcome
    log10_p: float
    alpha: float
    test: JudgedBy
    n_bits: int
    n_match: int
    ties: int
    match: float
    carriers: int
    queries: int
    access: Access
    scheme: str
    mark: str
    suspect: str
    keys_tried: int
    seconds: float
    version: str
    queries_allowed: int = 0
    reused: int = 0
    modified: bool | None = None
    own_program: bool = False
    reason: str = ""
    log10_e: float | None = None
    evidence: tuple[tuple[int, float], ...] = ()
    reading: Reading | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary of JSON values, without the reading."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "reading"}


@runtime_checkable
class BlackBox(Protocol):
    """Anything that maps a batch to class scores. All a thief's API gives us."""

    name: str
    digest: str
    """``sha256:...`` of the model's bytes, or of the endpoint's address."""

    def query(self, x: Tensor) -> Tensor:
        """Scores (b, C) of inputs (b, *shape): logits or probabilities, float32 on the CPU.

        Raises ModelError on NaN, infinite or wrongly shaped answers, EndpointError where a remote
        model fails for good.
        """
        ...


@runtime_checkable
class WhiteBox(BlackBox, Protocol):
    """A model whose input gradients can be taken."""

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Gradient (b, *shape) of ``(scores(x) * v).sum()`` with respect to ``x``; v (b, C)."""
        ...


@runtime_checkable
class WeightBox(BlackBox, Protocol):
    """A model whose weights lie open."""

    def weights(self, *, buffers: bool = False) -> dict[str, Tensor]:
        """By name, in order, float32 on the CPU: every parameter, where asked for floating buffers too."""
        ...


class Mark(Protocol):
    """A scheme's secrets for one key and model: directions, bits, carrier order. Never stored."""

    spec: ModelSpec
    bits: Tensor
    """(n,) of +1 and -1."""


class Scheme(Protocol):
    """A way to carry bits. A frozen value: it is its own configuration and holds no model."""

    @property
    def name(self) -> str: ...

    def parameters(self) -> dict[str, Any]:
        """The public parameters that, with the key and the spec, rebuild the mark."""
        ...

    def mark(self, key: Any, spec: ModelSpec) -> Any:
        """Derive the :class:`Mark`: deterministic, from the key and the public spec alone."""
        ...

    def probe(
        self, mark: Any, model: nn.Module, batch: Batch, generator: torch.Generator, method: Any
    ) -> tuple[Tensor, Tensor]:
        """Readings times bits (m, A), differentiable in the weights, and the bits' numbers (m, A)."""
        ...

    def read(
        self, mark: Any, suspect: Any, pool: Batch, *, access: Access, carriers: int, queries: int = 0
    ) -> Reading:
        """Signed numbers and bits; the carriers are chosen from ``pool`` by the key alone."""
        ...


@dataclass(frozen=True)
class Utility:
    """``percent``: the headline, higher is better, of ``n`` judgements; ``details``: by the field's names."""

    percent: float
    n: int
    details: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """What differs between domains, and nothing else does. A frozen value that holds no model.

    To bring your own: write these six (``docs/tasks.md`` shows one), or derive from
    :class:`gradmark.views.Classification`, which has all but the data and the network. How inputs
    are perturbed follows from ``data().spec``: its domain picks the directions in
    :mod:`gradmark.carriers`, its bounds and levels what a nudged input may be.
    ``gradmark.views.View(task, model)`` is then a module (white-box) and ``gradmark.views.Asked(task, api)``
    a black box from inputs (b, *shape) to scores (b, C), which every scheme, attack and report takes.
    ``price`` (optional, 1): calls to the API for one input's scores; ``entry`` (optional, 0): calls
    that are needed once.
    """

    @property
    def name(self) -> str: ...

    def data(self) -> Any:
        """A :class:`gradmark.data.Data`: the split to train on, the split that nothing is trained on, and
        the public :class:`ModelSpec`, whose ``n_classes`` is the C of :meth:`scores`."""
        ...

    def network(self) -> nn.Module:
        """An untrained network of the owner's architecture; it answers as its natural API would."""
        ...

    def scores(self, model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """Log-scores (b, C), up to a constant a row, of inputs (b, *shape) by asking ``model`` alone.

        ``model`` is a module or an API, so ask it as one asks an API; keep what it answers
        differentiable, and bring tensors of your own to ``x``'s dtype and device.
        """
        ...

    def carriers(self, batch: tuple[Tensor, Any]) -> Batch:
        """The inputs of a batch (inputs, targets) that can carry the mark, with the class (b,) in
        [0, C) that each one's contrasts must leave alone: the right answer, as far as there is one."""
        ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, Any], smoothing: float = 0.0) -> Tensor:
        """The owner's objective on a batch to train on: a scalar. ``smoothing``: of labels, if it has any."""
        ...

    def utility(self, model: nn.Module) -> Utility:
        """What ``model`` is worth on the split that nothing is trained on."""


@runtime_checkable
class Choosy(Protocol):
    """A scheme whose penalty can ride on some inputs only."""

    def carrying(self, mark: Any, labels: Tensor) -> Tensor:
        """Which inputs (b,) of these labels (b,) can carry it. The Marker skips batches without any."""


@dataclass(frozen=True)
class Thief:
    """What a thief has besides the stolen model. Never the owner's key.

    ``x`` (n, *shape), ``labels`` (n,): inputs of the owner's distribution with the task's targets.
    ``surrogate`` (m, *shape): unlabelled inputs of another distribution. ``sibling``: an unmarked
    network of the same architecture. ``fresh``, ``other``: untrained ones of the same and of another.
    ``marker``: from a seed, his own marker of the owner's scheme. ``lr``, ``optimizer``, ``batch_size``,
    ``augment`` (inputs and a generator to inputs), ``autocast``: how he trains. ``directions``: what the mark
    file says of the owner's: ``step``, ``kernel_size``, ``view``.
    """

    spec: ModelSpec
    x: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    surrogate: Tensor | None = field(default=None, repr=False)
    sibling: nn.Module | None = field(default=None, repr=False)
    fresh: Callable[[], nn.Module] | None = field(default=None, repr=False)
    other: Callable[[], nn.Module] | None = field(default=None, repr=False)
    marker: Callable[[int], Any] | None = field(default=None, repr=False)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = field(default=None, repr=False)
    lr: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: int = 64
    autocast: torch.dtype | None = None
    directions: Mapping[str, Any] = field(default_factory=dict)


class Attack(Protocol):
    """Something a thief does to a model, or puts in front of it, leaving the old model alone.

    A frozen dataclass of plain numbers and words, so that a benchmark can name and repeat it.
    """

    @property
    def name(self) -> str: ...

    def run(self, model: nn.Module, thief: Thief, generator: torch.Generator) -> nn.Module:
        """The attacked copy of ``model``, in eval mode; what defends an API is a module around it.

        Raises AttackError where the thief lacks what the attack needs or the model doesn't allow it.
        """
        ...
