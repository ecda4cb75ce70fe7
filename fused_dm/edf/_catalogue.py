"""The catalogue: published losses and weightings, each by the weight w(p) that it gives an example.

A loss L = f(p) through a softmax has w(p) = 2 p q |f'(p)|, q = 1 - p. The functions here take log p and log q, from which
nothing cancels near p = 0 and p = 1.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._density import EDF, Family

_LN2 = math.log(2.0)


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


_DM = Family(_dm_log_weight, None)


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
    mathematics: ClassVar[Any] = _DM

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
    mathematics: ClassVar[Any] = _DM

    @property
    def params(self) -> tuple[float, ...]:
        return (self.beta, 0.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.beta * (1 - p))


@dataclasses.dataclass(frozen=True)
class Uniform(EDF):
    """w(p) = 1: every example's gradient has the same L1 norm."""

    family: ClassVar[str] = "dm"
    mathematics: ClassVar[Any] = _DM

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
    mathematics: ClassVar[Any] = _DM

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
    mathematics: ClassVar[Any] = Family(_cce_log_weight, _cce_loss)

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p)


@dataclasses.dataclass(frozen=True)
class MAE(EDF):
    """Mean absolute error of the label's probability: f(p) = 1 - p, w(p) = 2 p (1 - p).

    Reference: Ghosh et al., Robust Loss Functions under Label Noise, arXiv 1712.09482.
    """

    family: ClassVar[str] = "mae"
    mathematics: ClassVar[Any] = Family(_mae_log_weight, _mae_loss)

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
    mathematics: ClassVar[Any] = Family(_gce_log_weight, _gce_loss)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.q <= 1:
            raise ValueError(f"GCE: expected 0 < q <= 1, got {self.q}")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p**self.q * (1 - p)


CATALOGUE: tuple[type[EDF], ...] = (DM, Exponential, Uniform, IMAE, CCE, MAE, GCE)
