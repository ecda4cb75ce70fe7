"""EDFs that are designed as a weight w(p), without a loss in closed form: what is reported is -w(p) log p."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._density import EDF, LARGEST, finite


def require(owner: object, condition: bool, name: str, wanted: str) -> None:
    """Raise a ValueError that names the class, the parameter, what was expected and what was given."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: expected {wanted}, got {getattr(owner, name)}")


def _argument(owner: str, name: str, value: Any, low: float, high: float, wanted: str) -> float:
    """An argument of an alternative constructor, a finite number in [low, high]."""
    found = finite(value)
    if found is None or not low <= found <= min(high, LARGEST):
        raise ValueError(f"{owner}: expected {wanted}, got {name}={value!r}")
    return found


@dataclasses.dataclass(frozen=True)
class DM(EDF):
    """The EDF of derivative manipulation: w(p) = exp(beta p^lambd (1 - p)).

    Examples with p near `lambd / (1 + lambd)` count most; `beta` sets how much more than the others. The more labels are
    wrong, the larger `lambd` should be: clean labels take lambd = 0 and a beta of 1 or 2, 40 % wrong ones (16, 1). `beta` and
    `lambd` are called "scale" and "lambda_p" in the original layer.

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
        require(self, self.lambd >= 0, "lambd", "lambd >= 0")

    @classmethod
    def from_mode(cls, mode: float, ratio: float) -> "DM":
        """The DM whose weight is largest at p = `mode`, and there `ratio` times the smallest, w(1).

        Args:
            mode: in [0, 1); lambd = mode / (1 - mode).
            ratio: at least 1.

        Raises:
            ValueError: an argument is out of its range.
        """
        mode = _argument("DM.from_mode", "mode", mode, 0.0, math.nextafter(1.0, 0.0), "0 <= mode < 1")
        ratio = _argument("DM.from_mode", "ratio", ratio, 1.0, math.inf, "a finite ratio >= 1")
        # The peak is beta mode^lambd (1 - mode) in the exponent.
        lambd = mode / (1 - mode)
        return cls(beta=math.log(ratio) / (mode**lambd * (1 - mode)), lambd=lambd)

    def _known_mode(self) -> float | None:
        return self.lambd / (1 + self.lambd) if self.beta > 0 else None

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.beta * p**self.lambd * (1 - p))


@dataclasses.dataclass(frozen=True)
class Exponential(EDF):
    """w(p) = exp(beta (1 - p)), which is DM with lambd = 0: hard examples first for beta > 0, easy ones for beta < 0.

    For clean labels; unlike cross entropy it neither forgets fitted examples nor leaves them.

    Args:
        beta: any finite number; 1 or 2 suits clean labels.

    Raises:
        ValueError: `beta` is not a finite number.

    Reference: arXiv 1905.11233.
    """

    beta: float
    family: ClassVar[str] = "dm"

    @classmethod
    def from_ratio(cls, ratio: float) -> "Exponential":
        """The exponential that gives the hardest example `ratio` times the weight of the easiest: ratio = w(0) / w(1).

        Args:
            ratio: above 0; below 1 puts easy examples first.

        Raises:
            ValueError: `ratio` is not a finite number above 0.
        """
        ratio = _argument("Exponential.from_ratio", "ratio", ratio, math.ulp(0.0), math.inf, "a finite ratio > 0")
        return cls(beta=math.log(ratio))

    @property
    def params(self) -> tuple[float, ...]:
        return (self.beta, 0.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.beta * (1 - p))


@dataclasses.dataclass(frozen=True)
class Normal(EDF):
    """w(p) = exp(-beta p (p - 2 psi)), a bell around p = psi that is 1 at p = 0.

    For the same purposes as DM, where the examples that count most should be named by their probability; the weight falls
    to both sides alike.

    Args:
        psi: any finite number; the mode where it lies in [0, 1].
        beta: any finite number; the larger, the narrower. Negative, it is a well.

    Raises:
        ValueError: a parameter is not a finite number, or log w leaves the range of fp32.

    Reference: arXiv 1905.11233 (its normal distribution).
    """

    psi: float
    beta: float
    family: ClassVar[str] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = abs(self.beta) * (1 + 2 * abs(self.psi))
        require(self, largest <= LARGEST, "beta", "beta (1 + 2 psi) to be a number that fp32 can hold")

    @classmethod
    def from_mode(cls, mode: float, ratio: float) -> "Normal":
        """The bell around p = `mode` that is there `ratio` times its smallest value, at the further end of [0, 1].

        Args:
            mode: in [0, 1].
            ratio: at least 1.

        Raises:
            ValueError: an argument is out of its range.
        """
        mode = _argument("Normal.from_mode", "mode", mode, 0.0, 1.0, "0 <= mode <= 1")
        ratio = _argument("Normal.from_mode", "ratio", ratio, 1.0, math.inf, "a finite ratio >= 1")
        return cls(psi=mode, beta=math.log(ratio) / max(mode, 1 - mode) ** 2)

    def _known_mode(self) -> float | None:
        return min(max(self.psi, 0.0), 1.0) if self.beta > 0 else None

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(-self.beta * p * (p - 2 * self.psi))


@dataclasses.dataclass(frozen=True)
class Beta(EDF):
    """w(p) = p^(alpha - 1) (1 - p)^(eta - 1), the Beta density but for its constant.

    For weights that vanish at both ends (alpha, eta > 1), so that neither hopeless nor fitted examples count. An exponent
    below 1 makes the weight infinite at that end: finite for any finite logits, but a single hopeless or fitted
    example may then outweigh the batch.

    Args:
        alpha: above 0.
        eta: above 0.

    Raises:
        ValueError: a parameter is not a finite number above 0.

    Reference: arXiv 1905.11233 (its Beta distribution).
    """

    alpha: float
    eta: float
    family: ClassVar[str] = "beta"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.alpha > 0, "alpha", "alpha > 0")
        require(self, self.eta > 0, "eta", "eta > 0")

    @classmethod
    def from_mode(cls, mode: float, concentration: float) -> "Beta":
        """The Beta weight whose mode is `mode` and whose alpha + eta is `concentration`.

        Args:
            mode: in [0, 1].
            concentration: at least 2; at 2 every example counts alike, and the larger, the narrower.

        Raises:
            ValueError: an argument is out of its range.
        """
        mode = _argument("Beta.from_mode", "mode", mode, 0.0, 1.0, "0 <= mode <= 1")
        concentration = _argument(
            "Beta.from_mode", "concentration", concentration, 2.0, math.inf, "a finite concentration alpha + eta >= 2"
        )
        return cls(alpha=1 + mode * (concentration - 2), eta=1 + (1 - mode) * (concentration - 2))

    def _known_mode(self) -> float | None:
        if self.alpha < 1 or self.eta < 1 or self.alpha + self.eta == 2:
            return None
        return (self.alpha - 1) / (self.alpha + self.eta - 2)

    def weight(self, p: Tensor) -> Tensor:
        return p ** (self.alpha - 1) * (1 - p) ** (self.eta - 1)


@dataclasses.dataclass(frozen=True)
class Uniform(EDF):
    """w(p) = 1: every example's gradient has the same L1 norm.

    A baseline, and a constant to add to other EDFs.
    """

    family: ClassVar[str] = "dm"

    @property
    def params(self) -> tuple[float, ...]:
        return (0.0, 0.0)

    def weight(self, p: Tensor) -> Tensor:
        return torch.ones_like(p)


@dataclasses.dataclass(frozen=True)
class IMAE(EDF):
    """Improved mean absolute error: w(p) = exp(T p (1 - p)), which is DM(beta=T, lambd=1).

    For noisy labels: the uncertain count most, as under MAE, but the others are not forgotten.

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

    def _known_mode(self) -> float | None:
        return 0.5 if self.T > 0 else None

    def weight(self, p: Tensor) -> Tensor:
        return torch.exp(self.T * p * (1 - p))
