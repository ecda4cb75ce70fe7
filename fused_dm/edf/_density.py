"""The base class of emphasis density functions, and what can be made of them: sums, products, multiples, truncations, floors.

An implementation asks an EDF for three things: `params`, numbers that it reads from a tensor; `forms`, functions of (log_p,
log_q, *params); and `fused`, whether the kernels know those functions under the name `family`. `structure` names the functions
where they are determined by a name: EDFs of one structure differ in their numbers alone.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from ._forms import FAMILIES, Family, log, log_complement
from ._measure import Measures, exp, measure

# The implementations compute with parameters of a family in fp32.
LARGEST = torch.finfo(torch.float32).max
# A weight below the least normal fp64 is 0 beside an infinite -log p.
LOG_LEAST = math.log(torch.finfo(torch.float64).tiny)


def text_of(value: float) -> str:
    """The shortest decimal that reads back as `value`."""
    return repr(value).removesuffix(".0")


def finite(value: Any) -> float | None:
    """A real number, numpy's among them, as a float; None where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if not isinstance(value, (int, float)):
        try:
            value = float(value)
        except OverflowError:
            return None
    # By comparisons, which compiled code can trace.
    largest = torch.finfo(torch.float64).max
    return float(value) if -largest <= value <= largest else None


def number(owner: object, name: str, value: Any) -> float:
    """`value` as a finite float, or a ValueError that names the class and the parameter."""
    found = finite(value)
    if found is None:
        raise ValueError(f"{type(owner).__name__}: expected {name} to be a finite number, got {value!r}")
    return found


@functools.lru_cache(maxsize=1024)
def _of_equal_ones(emphasis: "EDF") -> Measures:
    return measure(emphasis.log_weight, emphasis._jumps())


def _measures(emphasis: "EDF") -> Measures:
    emphasis.check_fields()
    return _of_equal_ones(emphasis)


@dataclasses.dataclass(frozen=True)
class EDF:
    """Base class of the emphasis density functions.

    EDFs can be added, multiplied with each other, multiplied by a positive number, truncated to an interval of p, and given
    a floor; the results are EDFs::

        0.5 * edf.CCE() + 2 * edf.MAE()
        edf.DM(beta=8, lambd=0.5) * edf.CCE()
        edf.GCE(q=0.7).truncate(0.2, 0.9)
        edf.MAE().floor(0.1)

    A sum reports the sum of its parts' f, if each has one; a multiple the multiple; a truncated one the part's f, held
    constant outside of the interval; products and floors have no f and report -w log p.

    A subclass of your own overrides `log_weight`, and `loss` if it has a closed form f. It is then computed by those methods,
    whatever it inherits from. What it has in attributes are the fields of a frozen dataclass, as two EDFs are equal where those
    are. `fused_dm.edf.register` makes a class of a function, with a fused form if it is given one.

    Attributes:
        family: name of the mathematics.
        in_kernels: whether the kernels have the family.
        params: its parameters, in order: numbers that fp32 can hold, but for the factor of a multiple and the floor.
        structure: name of the mathematics in torch: EDFs of one structure differ in `params` alone. None for a subclass that
            overrides it.
        has_loss: whether the weight belongs to a loss with a closed form f(p).
        mode: the p in [0, 1] where w is largest, the lowest of several, or the edge of it where w jumps; to about 1e-8 where
            there is no formula.
        integral: of w over p in (0, 1); inf where it diverges.
        log_integral: its natural log, which no parameter overflows.
        variance: of w(p) for p uniform over (0, 1); inf where it diverges.
        peak_ratio: largest w over smallest, inf where the smallest is 0.
    """

    family: ClassVar[str] = ""
    in_kernels: ClassVar[bool] = True
    _composed: ClassVar[bool] = False
    _own_weight: ClassVar[bool] = False
    _own_loss: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = cls.__dict__
        if cls._composed or "family" in own:
            return
        if "weight" in own and "log_weight" not in own and not cls._own_weight:
            raise TypeError(f"{cls.__name__}: expected log_weight(log_p, log_q) beside weight(p); the loss is computed from it")
        if "log_weight" in own:
            cls._own_weight = True
            cls._own_loss = False
            if "weight" not in own:
                # The formula of the base is that of another weight.
                type.__setattr__(cls, "weight", EDF.weight)
        if "loss" in own:
            cls._own_loss = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = number(self, field.name, getattr(self, field.name))
            if abs(value) > LARGEST:
                raise ValueError(
                    f"{type(self).__name__}: expected {field.name} to be a number that fp32 can hold, got {value!r}"
                )
            object.__setattr__(self, field.name, value)

    def check_fields(self) -> None:
        """Refuse a subclass with attributes that decide nothing about whether two of its EDFs are equal: a TypeError."""
        if "__dataclass_fields__" in type(self).__dict__:
            return
        fields = {field.name for field in dataclasses.fields(self)}
        kept = {name for name in vars(self) if isinstance(getattr(type(self), name, None), functools.cached_property)}
        if unknown := set(vars(self)) - fields - kept:
            raise TypeError(
                f"{type(self).__name__}: expected a class decorated by @dataclasses.dataclass(frozen=True), whose fields say "
                f"what its weight depends on, got one with the attributes {sorted(unknown)} that are no fields"
            )

    def __str__(self) -> str:
        fields = ",".join(f"{field.name}={text_of(getattr(self, field.name))}" for field in dataclasses.fields(self))
        name = type(self).__name__.lower()
        return f"{name}:{fields}" if fields else name

    @property
    def params(self) -> tuple[float, ...]:
        """The parameters of the family, in its order."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def structure(self) -> str | None:
        """Name of the mathematics; None where a subclass overrides it."""
        return None if self._own_weight or self._own_loss or not self.family else self.family

    @property
    def fused(self) -> bool:
        """Whether the kernels have the mathematics, under the name `family`."""
        return self.in_kernels and self.structure is not None

    @property
    def has_loss(self) -> bool:
        """Whether the weight belongs to a loss with a closed form f(p)."""
        if self._own_weight or self._own_loss or not self.family:
            return self._own_loss
        return FAMILIES[self.family].loss is not None

    @property
    def forms(self) -> Family:
        """The functions of (log_p, log_q, *params) that the implementations compute with."""
        if self.structure is not None:
            return FAMILIES[self.family]
        own = self

        def log_weight(log_p: Tensor, log_q: Tensor, *_: Any) -> Tensor:
            return own.log_weight(log_p, log_q)

        def loss(log_p: Tensor, log_q: Tensor, *_: Any) -> Tensor:
            return own.loss(log_p, log_q)

        return Family(log_weight, loss if self.has_loss else None)

    def weight(self, p: Tensor) -> Tensor:
        """w(p) for probabilities `p` in [0, 1], any shape and float dtype, by the formula as it is written."""
        return torch.exp(self.log_weight(p.log().clamp(min=-1e30), torch.log1p(-p).clamp(min=-1e30)))

    def log_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """log w from log p and log(1 - p): exact near p = 0 and p = 1, where p itself has no digits left.

        Args:
            log_p: natural log of the label's probability, any shape, at least -1e30.
            log_q: natural log of one minus it, same shape, at least -1e30.
        """
        if not self.family:
            raise TypeError(f"{type(self).__name__}: expected the class to define log_weight(log_p, log_q)")
        return FAMILIES[self.family].log_weight(log_p, log_q, *self.params)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The value that is reported for an example: f(p) where it exists, and -w(p) log p otherwise."""
        closed_form = None if self._own_weight or not self.family else FAMILIES[self.family].loss
        if closed_form is not None:
            return closed_form(log_p, log_q, *self.params)
        log_weight = self.log_weight(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30))
        value = torch.where(log_p == 0, 0.0, -torch.exp(log_weight) * log_p)
        return torch.where(log_p == -math.inf, torch.where(log_weight < LOG_LEAST, 0.0, -log_p), value)

    @property
    def mode(self) -> float:
        """The p in [0, 1] where w is largest, the lowest of several; the edge of it where w jumps."""
        known = None if self._own_weight else self._known_mode()
        return _measures(self).mode if known is None else known

    def _known_mode(self) -> float | None:
        """The mode where there is a formula for it."""
        return None

    def _jumps(self) -> tuple[float, ...]:
        """Some p where the weight jumps: an interval between two may be too narrow to be found."""
        return ()

    @property
    def integral(self) -> float:
        """The integral of w over p in (0, 1); inf where it diverges."""
        return exp(_measures(self).log_integral)

    @property
    def log_integral(self) -> float:
        """The natural log of the integral; w(p) / integral is the density that a plot compares."""
        return _measures(self).log_integral

    @property
    def variance(self) -> float:
        """The variance of w(p) for p uniform over (0, 1); inf where it diverges."""
        return exp(_measures(self).log_variance)

    @property
    def peak_ratio(self) -> float:
        """The largest w over the smallest; inf where the smallest is 0."""
        measures = _measures(self)
        return exp(measures.log_peak - measures.log_trough)

    def truncate(self, low: float, high: float = 1.0) -> "Truncated":
        """This EDF where low < p <= high, and 0 elsewhere; from p = 0 on where `low` is 0."""
        return Truncated(self, low, high)

    def floor(self, least: float) -> "Floored":
        """The larger of w(p) and `least`: no example counts less."""
        return Floored(self, least)

    def __add__(self, other: Any) -> "EDF":
        return Sum((self, other)) if isinstance(other, EDF) else NotImplemented

    def __radd__(self, other: Any) -> "EDF":
        # sum() starts from 0.
        return self if type(other) is int and other == 0 else NotImplemented

    def __mul__(self, other: Union["EDF", float]) -> "EDF":
        if isinstance(other, EDF):
            factor, left = _split(self)
            more, right = _split(other)
            product = Product((left, right))
            return product if factor is None and more is None else Scaled((factor or 1.0) * (more or 1.0), product)
        if isinstance(other, numbers.Real) and not isinstance(other, bool):
            factor, part = _split(self)
            return Scaled(float(other) if factor is None else factor * float(other), part)
        return NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> "EDF":
        if isinstance(other, numbers.Real) and not isinstance(other, bool) and float(other) > 0:
            return self * (1 / float(other))
        return NotImplemented


def _split(emphasis: EDF) -> tuple[float | None, EDF]:
    return (emphasis.factor, emphasis.part) if isinstance(emphasis, Scaled) else (None, emphasis)


def _checked(owner: EDF, part: Any) -> EDF:
    if not isinstance(part, EDF) or type(part) is EDF:
        raise TypeError(f"{type(owner).__name__}: expected an EDF such as edf.CCE(), got {part!r}")
    return part


def _grouped(part: EDF, *kinds: type[EDF]) -> str:
    return f"({part})" if isinstance(part, kinds) else str(part)


class Composition(EDF):
    """An EDF made of others. It has no kernel: it runs on the margins, at a cost of order N."""

    _composed: ClassVar[bool] = True

    @property
    def members(self) -> tuple[EDF, ...]:
        """The EDFs that it is made of."""
        raise TypeError(f"{type(self).__name__} does not define members")

    @property
    def numbers(self) -> tuple[float, ...]:
        """Its own parameters, which come before those of its members."""
        return ()

    def check_fields(self) -> None:
        """Its members' too."""
        for member in self.members:
            member.check_fields()

    @property
    def params(self) -> tuple[float, ...]:
        """Its own parameters, then those of its members."""
        params = self.numbers
        for member in self.members:
            params = params + member.params
        return params

    @property
    def structure(self) -> str | None:
        """The names of the members in that of the composition; None where a member has none."""
        names = []
        for member in self.members:
            if member.structure is None:
                return None
            names.append(member.structure)
        return f"{type(self).__name__.lower()}({','.join(names)})"

    @property
    def fused(self) -> bool:
        """False."""
        return False

    @property
    def forms(self) -> Family:
        """The functions of (log_p, log_q, *params)."""
        return Family(self._log_weight, self._loss if self.has_loss else None)

    def _jumps(self) -> tuple[float, ...]:
        return tuple(jump for member in self.members for jump in member._jumps())

    def log_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self._log_weight(log_p, log_q, *self.params)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.has_loss:
            return self._loss(log_p, log_q, *self.params)
        return super().loss(log_p, log_q)

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define _log_weight")

    def _loss(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define _loss")

    def _log_weights(self, log_p: Tensor, log_q: Tensor, params: Sequence[Any]) -> list[Tensor]:
        """log w of each member; `params` are those of the members."""
        values, at = [], 0
        for member in self.members:
            count = len(member.params)
            values.append(member.forms.log_weight(log_p, log_q, *params[at : at + count]))
            at += count
        return values


@dataclasses.dataclass(frozen=True)
class Sum(Composition):
    """w(p) = the sum of the parts' w(p); f(p) the sum of their f(p), if all have one. Written `a + b`.

    Args:
        parts: two EDFs or more; a sum among them is taken apart.

    Raises:
        TypeError: a part is no EDF.
        ValueError: fewer than two parts.
    """

    parts: tuple[EDF, ...]

    def __post_init__(self) -> None:
        flat: list[EDF] = []
        for part in self.parts:
            flat.extend(part.parts if isinstance(part, Sum) else (_checked(self, part),))
        if len(flat) < 2:
            raise ValueError(f"Sum: expected two parts or more, got {len(flat)}")
        object.__setattr__(self, "parts", tuple(flat))

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)

    @property
    def members(self) -> tuple[EDF, ...]:
        return self.parts

    @property
    def has_loss(self) -> bool:
        return all(part.has_loss for part in self.parts)

    def weight(self, p: Tensor) -> Tensor:
        return torch.stack([part.weight(p) for part in self.parts]).sum(0)

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        return functools.reduce(torch.logaddexp, self._log_weights(log_p, log_q, params))

    def _loss(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        total, at = torch.zeros_like(log_p), 0
        for part in self.parts:
            count, loss = len(part.params), part.forms.loss
            if loss is not None:
                total = total + loss(log_p, log_q, *params[at : at + count])
            at += count
        return total


@dataclasses.dataclass(frozen=True)
class Product(Composition):
    """w(p) = the product of the parts' w(p), 0 where one of them is; it has no f. Written `a * b`.

    Args:
        parts: two EDFs or more; a product among them is taken apart.

    Raises:
        TypeError: a part is no EDF.
        ValueError: fewer than two parts.
    """

    parts: tuple[EDF, ...]

    def __post_init__(self) -> None:
        flat: list[EDF] = []
        for part in self.parts:
            flat.extend(part.parts if isinstance(part, Product) else (_checked(self, part),))
        if len(flat) < 2:
            raise ValueError(f"Product: expected two parts or more, got {len(flat)}")
        object.__setattr__(self, "parts", tuple(flat))

    def __str__(self) -> str:
        return "*".join(_grouped(part, Sum, Scaled) for part in self.parts)

    @property
    def members(self) -> tuple[EDF, ...]:
        return self.parts

    @property
    def has_loss(self) -> bool:
        return False

    def weight(self, p: Tensor) -> Tensor:
        weights = torch.stack([part.weight(p) for part in self.parts])
        return torch.where((weights == 0).any(0), torch.zeros_like(p), weights.prod(0))

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        return functools.reduce(torch.add, self._log_weights(log_p, log_q, params))


@dataclasses.dataclass(frozen=True)
class Scaled(Composition):
    """w(p) = factor times the part's w(p), and f(p) likewise. Written `factor * a`.

    On its own it matters under the reductions that do not divide by the sum of weights, and where that is near the 1e-8 which
    is added to it; in a sum, under all.

    Args:
        factor: above 0.
        part: an EDF.

    Raises:
        TypeError: the part is no EDF.
        ValueError: `factor` is not a finite number above 0.
    """

    factor: float
    part: EDF

    def __post_init__(self) -> None:
        _checked(self, self.part)
        object.__setattr__(self, "factor", number(self, "factor", self.factor))
        if self.factor <= 0:
            raise ValueError(f"Scaled: expected factor > 0, got {self.factor}")

    def __str__(self) -> str:
        return f"{text_of(self.factor)}*{_grouped(self.part, Sum, Scaled)}"

    @property
    def members(self) -> tuple[EDF, ...]:
        return (self.part,)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.factor,)

    @property
    def has_loss(self) -> bool:
        return self.part.has_loss

    def weight(self, p: Tensor) -> Tensor:
        return self.factor * self.part.weight(p)

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        return log(params[0]) + self.part.forms.log_weight(log_p, log_q, *params[1:])

    def _loss(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        loss = self.part.forms.loss
        return super()._loss(log_p, log_q) if loss is None else params[0] * loss(log_p, log_q, *params[1:])


@dataclasses.dataclass(frozen=True)
class Truncated(Composition):
    """The part's w(p) where low < p <= high, and 0 elsewhere; f is held constant there. Written `a.truncate(low, high)`.

    With a `low` of 0 the interval begins with p = 0.

    Args:
        part: an EDF.
        low: at least 0.
        high: above `low`, at most 1.

    Raises:
        TypeError: the part is no EDF.
        ValueError: not 0 <= low < high <= 1.
    """

    part: EDF
    low: float
    high: float = 1.0

    def __post_init__(self) -> None:
        _checked(self, self.part)
        object.__setattr__(self, "low", number(self, "low", self.low))
        object.__setattr__(self, "high", number(self, "high", self.high))
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"Truncated: expected 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def __str__(self) -> str:
        return f"{_grouped(self.part, Sum, Product, Scaled)}[{text_of(self.low)},{text_of(self.high)}]"

    @property
    def members(self) -> tuple[EDF, ...]:
        return (self.part,)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.low, self.high)

    @property
    def has_loss(self) -> bool:
        return self.part.has_loss

    def _jumps(self) -> tuple[float, ...]:
        return (self.low, self.high, *super()._jumps())

    def weight(self, p: Tensor) -> Tensor:
        above = (p >= 0) if self.low == 0 else (p > self.low)
        return torch.where(above & (p <= self.high), self.part.weight(p), torch.zeros_like(p))

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        low, high, *rest = params
        log_w = self.part.forms.log_weight(log_p, log_q, *rest)
        inside = (log_p > log(low)) & (log_q >= log_complement(high))
        return torch.where(inside, log_w, torch.full_like(log_w, -math.inf))

    def _loss(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        low, high, *rest = params
        loss = self.part.forms.loss
        if loss is None:
            return super()._loss(log_p, log_q)
        return loss(log_p.clamp(log(low), log(high)), log_q.clamp(log_complement(high), log_complement(low)), *rest)


@dataclasses.dataclass(frozen=True)
class Floored(Composition):
    """w(p) = the larger of the part's w(p) and `least`; it has no f. Written `a.floor(least)`.

    Args:
        part: an EDF.
        least: above 0.

    Raises:
        TypeError: the part is no EDF.
        ValueError: `least` is not a finite number above 0.
    """

    part: EDF
    least: float

    def __post_init__(self) -> None:
        _checked(self, self.part)
        object.__setattr__(self, "least", number(self, "least", self.least))
        if self.least <= 0:
            raise ValueError(f"Floored: expected least > 0, got {self.least}")

    def __str__(self) -> str:
        return f"max({self.part},{text_of(self.least)})"

    @property
    def members(self) -> tuple[EDF, ...]:
        return (self.part,)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.least,)

    @property
    def has_loss(self) -> bool:
        return False

    def weight(self, p: Tensor) -> Tensor:
        return self.part.weight(p).clamp(min=self.least)

    def _log_weight(self, log_p: Tensor, log_q: Tensor, *params: Any) -> Tensor:
        return self.part.forms.log_weight(log_p, log_q, *params[1:]).clamp(min=log(params[0]))
