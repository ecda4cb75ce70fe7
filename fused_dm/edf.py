"""Emphasis density functions (EDFs): how much an example counts, as a function of its label's probability.

An EDF is the L1 norm w(p) of one example's gradient with respect to its logits (Wang et al., Derivative Manipulation for
General Example Weighting, arXiv 1905.11233). Each class here is a frozen value object: hashable, comparable, printable,
and readable from text::

    >>> from fused_dm import edf
    >>> edf.parse("dm:beta=8,lambd=0.5")
    DM(beta=8.0, lambd=0.5)
    >>> str(edf.GCE(q=0.7))
    'gce:q=0.7'
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

__all__ = ["CCE", "DM", "EDF", "FAMILIES", "GCE", "IMAE", "MAE", "Exponential", "Family", "Uniform", "parse"]

_LN2 = math.log(2.0)


class Family(NamedTuple):
    """The mathematics of an EDF in torch: functions of (log_p, log_q, *parameters) on tensors of any shape.

    `log_weight` gives the natural log of w. `loss` gives the closed form f of the loss whose gradient has the norm w, or
    is None where there is none. A parameter is a float or a 0-d tensor.
    """

    log_weight: Callable[..., Tensor]
    loss: Callable[..., Tensor] | None


def _dm_log_weight(log_p: Tensor, log_q: Tensor, beta, lambd) -> Tensor:
    return beta * torch.exp(lambd * log_p + log_q)


def _cce_log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _LN2 + log_q


def _cce_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -log_p


def _mae_log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _LN2 + log_p + log_q


def _mae_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.exp(log_q)


def _gce_log_weight(log_p: Tensor, log_q: Tensor, q) -> Tensor:
    return _LN2 + q * log_p + log_q


def _gce_loss(log_p: Tensor, log_q: Tensor, q) -> Tensor:
    return -torch.expm1(q * log_p) / q


FAMILIES: dict[str, Family] = {
    "dm": Family(_dm_log_weight, None),
    "cce": Family(_cce_log_weight, _cce_loss),
    "mae": Family(_mae_log_weight, _mae_loss),
    "gce": Family(_gce_log_weight, _gce_loss),
}


def _text(value: float) -> str:
    return repr(value).removesuffix(".0")


@dataclasses.dataclass(frozen=True)
class EDF:
    """Base class of the built-in emphasis density functions.

    Attributes:
        family: name of the mathematics that the implementations share, a key of `FAMILIES`.
        params: the family's parameters, in order.
        has_loss: whether the weight belongs to a loss with a closed form f(p).
    """

    family: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
                raise ValueError(f"{type(self).__name__}: expected {field.name} to be a finite number, got {value!r}")
            object.__setattr__(self, field.name, float(value))

    def __str__(self) -> str:
        fields = ",".join(f"{field.name}={_text(getattr(self, field.name))}" for field in dataclasses.fields(self))
        name = type(self).__name__.lower()
        return f"{name}:{fields}" if fields else name

    @property
    def params(self) -> tuple[float, ...]:
        """The parameters of the family, in its order."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def has_loss(self) -> bool:
        """Whether the weight belongs to a loss with a closed form f(p)."""
        return FAMILIES[self.family].loss is not None

    def weight(self, p: Tensor) -> Tensor:
        """w(p) for probabilities `p` in [0, 1], any shape and float dtype, by the formula as it is written."""
        raise TypeError(f"{type(self).__name__} does not define weight(p)")

    def log_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """log w from log p and log(1 - p): exact near p = 0 and p = 1, where p itself has no digits left.

        Args:
            log_p: natural log of the label's probability, any shape, at least -1e30.
            log_q: natural log of one minus it, same shape, at least -1e30.
        """
        return FAMILIES[self.family].log_weight(log_p, log_q, *self.params)

    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The value that is reported for an example: f(p) where it exists, and -w(p) log p otherwise."""
        closed_form = FAMILIES[self.family].loss
        if closed_form is not None:
            return closed_form(log_p, log_q, *self.params)
        weight = torch.exp(self.log_weight(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)))
        return torch.where(weight == 0, torch.zeros_like(weight), -weight * log_p)


@dataclasses.dataclass(frozen=True)
class DM(EDF):
    """The EDF of derivative manipulation: w(p) = exp(beta p^lambd (1 - p)).

    Examples with p near `lambd / (1 + lambd)` count most; `beta` sets how much more than the others. The more labels are
    wrong, the larger `lambd` should be. `beta` and `lambd` are called "scale" and "lambda_p" in the original layer.

    Args:
        beta: any finite number; 0 weighs every example alike.
        lambd: at least 0.

    Raises:
        ValueError: a parameter is not a finite number, or `lambd` is negative.

    Reference: arXiv 1905.11233 (the exponential form, "scale" beta and "lambda_p" lambd of its released layer).
    """

    beta: float
    lambd: float
    family: ClassVar[str] = "dm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambd < 0:
            raise ValueError(f"DM: expected lambd >= 0, got {self.lambd}")

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.beta * p**self.lambd * (1 - p))


@dataclasses.dataclass(frozen=True)
class Exponential(EDF):
    """w(p) = exp(beta (1 - p)), which is DM with lambd = 0: hard examples first for beta > 0, easy ones for beta < 0.

    Args:
        beta: any finite number; 1 or 2 suits clean labels.

    Raises:
        ValueError: `beta` is not a finite number.

    Reference: arXiv 1905.11233.
    """

    beta: float
    family: ClassVar[str] = "dm"

    @property
    def params(self) -> tuple[float, ...]:
        return (self.beta, 0.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.beta * (1 - p))


@dataclasses.dataclass(frozen=True)
class Uniform(EDF):
    """w(p) = 1: every example's gradient has the same L1 norm."""

    family: ClassVar[str] = "dm"

    @property
    def params(self) -> tuple[float, ...]:
        return (0.0, 0.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.ones_like(p)


@dataclasses.dataclass(frozen=True)
class IMAE(EDF):
    """Improved mean absolute error: w(p) = exp(T p (1 - p)), which is DM(beta=T, lambd=1).

    Args:
        T: any finite number.

    Raises:
        ValueError: `T` is not a finite number.

    Reference: Wang et al., IMAE for Noise-Robust Learning, arXiv 1903.12141.
    """

    T: float = 8.0
    family: ClassVar[str] = "dm"

    @property
    def params(self) -> tuple[float, ...]:
        return (self.T, 1.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.T * p * (1 - p))


@dataclasses.dataclass(frozen=True)
class CCE(EDF):
    """Categorical cross entropy: f(p) = -log p, w(p) = 2 (1 - p).

    With `reduction="mean"` value and gradient are those of `torch.nn.functional.cross_entropy`.
    """

    family: ClassVar[str] = "cce"

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p)


@dataclasses.dataclass(frozen=True)
class MAE(EDF):
    """Mean absolute error of the label's probability: f(p) = 1 - p, w(p) = 2 p (1 - p).

    Reference: Ghosh et al., Robust Loss Functions under Label Noise, arXiv 1712.09482.
    """

    family: ClassVar[str] = "mae"

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p * (1 - p)


@dataclasses.dataclass(frozen=True)
class GCE(EDF):
    """Generalised cross entropy: f(p) = (1 - p^q) / q, w(p) = 2 p^q (1 - p).

    Args:
        q: in (0, 1]; towards 0 it becomes cross entropy, at 1 it is the mean absolute error.

    Raises:
        ValueError: `q` is not in (0, 1].

    Reference: Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, arXiv
    1805.07836.
    """

    q: float = 0.7
    family: ClassVar[str] = "gce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.q <= 1:
            raise ValueError(f"GCE: expected 0 < q <= 1, got {self.q}")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p**self.q * (1 - p)


_NAMES: dict[str, type[EDF]] = {kind.__name__.lower(): kind for kind in (DM, Exponential, Uniform, IMAE, CCE, MAE, GCE)}
# Parameters by lower-case name, and those without a default. Made here, as compiled code cannot ask a dataclass.
_FIELDS = {name: {field.name.lower(): field.name for field in dataclasses.fields(kind)} for name, kind in _NAMES.items()}
_REQUIRED = {
    name: [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    for name, kind in _NAMES.items()
}


def parse(text: str) -> EDF:
    """The EDF that `text` names, the inverse of `str(edf)`: "name" or "name:parameter=number,parameter=number".

    Args:
        text: for example "cce" or "dm:beta=8,lambd=0.5"; the case of the name does not matter.

    Returns:
        The frozen EDF.

    Raises:
        ValueError: the name, a parameter or a number is not known; the message names what was expected.
    """
    name, _, rest = text.partition(":")
    kind = _NAMES.get(name.strip().lower())
    if kind is None:
        near = difflib.get_close_matches(name.strip().lower(), _NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown EDF {name.strip()!r}{hint} Known: {', '.join(_NAMES)}")
    fields = _FIELDS[name.strip().lower()]
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, _, number = (piece.strip() for piece in part.partition("="))
        field = fields.get(key.lower())
        if field is None or field in values:
            raise ValueError(f"EDF {text!r}: expected each of ({', '.join(fields.values())}) at most once, got {part!r}")
        try:
            values[field] = float(number)
        except ValueError:
            raise ValueError(f"EDF {text!r}: expected a number for {key}, got {number!r}") from None
    missing = [field for field in _REQUIRED[name.strip().lower()] if field not in values]
    if missing:
        raise ValueError(f"EDF {text!r}: expected a value for {', '.join(missing)}")
    return kind(**values)
