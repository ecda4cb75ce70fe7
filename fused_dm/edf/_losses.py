"""EDFs of published losses: w(p) = 2 p q |f'(p)| for a loss f(p) through a softmax, q = 1 - p, and f is what is reported.

Under `reduction="mean"` value and gradient are those of the published loss.
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from ._density import EDF
from ._designed import require
from ._forms import TAYLOR_TERMS

# Of what is divided by: fp32 has no digits below.
TINY = torch.finfo(torch.float32).tiny
# Of powers, whose products with the smallest logarithms are in the range of fp32.
LEAST_POWER = 1e-20
# exp of it is in the range of fp32, with room for what it is multiplied by.
LARGEST_LOG = 80.0


@dataclasses.dataclass(frozen=True)
class CCE(EDF):
    """Categorical cross entropy: f(p) = -log p, w(p) = 2 (1 - p).

    For clean labels: the hardest examples count most, fitted ones not at all. With `reduction="mean"` value and gradient are
    those of `torch.nn.functional.cross_entropy`.
    """

    family: ClassVar[str] = "cce"

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p)


@dataclasses.dataclass(frozen=True)
class MAE(EDF):
    """Mean absolute error of the label's probability: f(p) = 1 - p, w(p) = 2 p (1 - p).

    For many wrong labels and few classes: it is robust to symmetric noise, but hopeless examples, which at many classes are all
    of them, do not count. DFT has the same gradient.

    Reference: Ghosh et al., Robust Loss Functions under Label Noise, arXiv 1712.09482.
    """

    family: ClassVar[str] = "mae"

    def _known_mode(self) -> float | None:
        return 0.5

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p * (1 - p)


@dataclasses.dataclass(frozen=True)
class DFT(EDF):
    """Dynamic fine-tuning, -sg(p) log p with sg the stop-gradient: w(p) = 2 p (1 - p), the gradient of MAE.

    For fine-tuning a pretrained model, which already gives its labels a probability. The reported value is -p log p; it holds
    the factor p constant, so its derivative is not the gradient.

    Reference: Wu et al., On the Generalization of SFT, arXiv 2508.05629.
    """

    family: ClassVar[str] = "dft"

    def _known_mode(self) -> float | None:
        return 0.5

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p * (1 - p)


@dataclasses.dataclass(frozen=True)
class MSE(EDF):
    """Squared error of the label's probability alone: f(p) = (1 - p)^2, w(p) = 4 p (1 - p)^2.

    For noisy labels, between MAE and cross entropy: it leaves the fitted sooner than MAE. The errors of the other classes'
    probabilities are not in it; with them the gradient has another direction.

    Reference: Ghosh et al., Robust Loss Functions under Label Noise, arXiv 1712.09482 (the mean square error, label's entry).
    """

    family: ClassVar[str] = "mse"

    def _known_mode(self) -> float | None:
        return 1 / 3

    def weight(self, p: Tensor) -> Tensor:
        return 4 * p * (1 - p) ** 2


@dataclasses.dataclass(frozen=True)
class GCE(EDF):
    """Generalised cross entropy: f(p) = (1 - p^q) / q, w(p) = 2 p^q (1 - p).

    For noisy labels: q moves from cross entropy, which starts fast, to MAE, which is robust.

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
        require(self, 0 < self.q <= 1, "q", "0 < q <= 1")
        require(self, self.q >= LEAST_POWER, "q", f"q to be at least {LEAST_POWER}, as f has no digits in fp32 below")

    def _known_mode(self) -> float | None:
        return self.q / (1 + self.q)

    def weight(self, p: Tensor) -> Tensor:
        return 2 * p**self.q * (1 - p)


@dataclasses.dataclass(frozen=True)
class TruncatedGCE(EDF):
    """GCE that gives up on hopeless examples: f is that of GCE for p > k and constant below, w(p) = 2 p^q (1 - p) [p > k].

    For noisy labels, once the network has learnt something: before, every example may lie below k.

    Args:
        q: in (0, 1], as in GCE.
        k: in (0, 1).

    Raises:
        ValueError: a parameter is out of its range.

    Reference: Zhang and Sabuncu, arXiv 1805.07836, section 3.3.
    """

    q: float = 0.7
    k: float = 0.5
    family: ClassVar[str] = "truncated_gce"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.q <= 1, "q", "0 < q <= 1")
        require(self, self.q >= LEAST_POWER, "q", f"q to be at least {LEAST_POWER}, as f has no digits in fp32 below")
        require(self, 0 < self.k < 1, "k", "0 < k < 1")
        require(self, self.k >= TINY, "k", "k to be a normal number of fp32")

    def _known_mode(self) -> float | None:
        return max(self.k, self.q / (1 + self.q))

    def weight(self, p: Tensor) -> Tensor:
        return torch.where(p > self.k, 2 * p**self.q * (1 - p), torch.zeros_like(p))


@dataclasses.dataclass(frozen=True)
class Focal(EDF):
    """Focal loss: f(p) = -(1 - p)^gamma log p, w(p) = 2 (1 - p)^gamma (1 - p - gamma p log p).

    For clean labels where easy examples are many. The form that holds the factor constant, -sg((1 - p)^gamma) log p, is
    `edf.CCE() * edf.Beta(alpha=1, eta=gamma + 1)`.

    Args:
        gamma: at least 0; 0 is cross entropy.

    Raises:
        ValueError: `gamma` is negative.

    Reference: Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002.
    """

    gamma: float = 2.0
    family: ClassVar[str] = "focal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.gamma >= 0, "gamma", "gamma >= 0")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) ** self.gamma * (1 - p - self.gamma * torch.xlogy(p, p))


@dataclasses.dataclass(frozen=True)
class SCE(EDF):
    """Symmetric cross entropy: f(p) = -alpha log p + beta A (1 - p), w(p) = 2 (1 - p) (alpha + beta A p).

    For noisy labels: cross entropy to start with, plus a robust part, which is MAE.

    Args:
        alpha: weight of cross entropy, at least 0.
        beta: weight of the reverse cross entropy, at least 0, not both 0.
        A: what stands for -log 0 in the reverse cross entropy, above 0; -A in the paper.

    Raises:
        ValueError: a parameter is out of its range.

    Reference: Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, arXiv 1908.06112.
    """

    alpha: float = 0.1
    beta: float = 1.0
    A: float = 4.0
    family: ClassVar[str] = "sce"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.alpha >= 0, "alpha", "alpha >= 0")
        require(self, self.beta >= 0, "beta", "beta >= 0")
        require(self, self.A > 0, "A", "A > 0")
        require(self, self.alpha + self.beta > 0, "beta", "alpha or beta above 0")
        require(self, not 0 < self.alpha < TINY, "alpha", "alpha to be 0 or a normal number of fp32")
        require(self, self.beta == 0 or self.A * self.beta >= TINY, "beta", "A beta to be 0 or a normal number of fp32")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * (self.alpha + self.beta * self.A * p)


@dataclasses.dataclass(frozen=True)
class TaylorCE(EDF):
    """Cross entropy's Taylor series up to order t: f(p) = sum over i = 1..t of (1 - p)^i / i, w(p) = 2 (1 - p) (1 - (1 - p)^t).

    For noisy labels: t moves from MAE (t = 1) to cross entropy (large t).

    Args:
        t: an integer from 1 to 64.

    Raises:
        ValueError: `t` is no integer, or out of its range.

    Reference: Feng et al., Can Cross Entropy Loss Be Robust to Label Noise?, IJCAI 2020.
    """

    t: int = 2
    family: ClassVar[str] = "taylorce"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1 <= self.t <= TAYLOR_TERMS and self.t % 1 == 0, "t", f"t to be an integer from 1 to {TAYLOR_TERMS}")
        object.__setattr__(self, "t", int(self.t))

    @property
    def params(self) -> tuple[float, ...]:
        return (float(self.t),)

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * (1 - (1 - p) ** self.t)


@dataclasses.dataclass(frozen=True)
class Poly1(EDF):
    """PolyLoss of one term: f(p) = -log p + eps (1 - p), w(p) = 2 (1 - p) (1 + eps p).

    For clean labels, to tune cross entropy: eps > 0 gives more weight to the easy half, eps < 0 less.

    Args:
        eps: at least -1.

    Raises:
        ValueError: `eps` is below -1, where the weight would be negative.

    Reference: Leng et al., PolyLoss, arXiv 2204.12511.
    """

    eps: float = 1.0
    family: ClassVar[str] = "poly1"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.eps >= -1, "eps", "eps >= -1")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * (1 + self.eps * p)


@dataclasses.dataclass(frozen=True)
class PHuberCE(EDF):
    """Partially Huberised cross entropy: -log p, but linear below p = 1 / tau; w(p) = 2 (1 - p) min(1, tau p).

    For noisy labels: cross entropy whose gradient by p is clipped, so that hopeless examples do not dominate.

    Args:
        tau: at least 1; at 1 it is MAE, and the larger, the closer to cross entropy.

    Raises:
        ValueError: `tau` is below 1.

    Reference: Menon et al., Can Gradient Clipping Mitigate Label Noise?, ICLR 2020.
    """

    tau: float = 10.0
    family: ClassVar[str] = "phuberce"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.tau >= 1, "tau", "tau >= 1")

    def _known_mode(self) -> float | None:
        return min(0.5, 1 / self.tau)

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * (self.tau * p).clamp(max=1)


@dataclasses.dataclass(frozen=True)
class AUL(EDF):
    """Asymmetric unhinged loss: f(p) = ((a - p)^q - (a - 1)^q) / q, w(p) = 2 p (1 - p) (a - p)^(q - 1).

    For many wrong labels. q > 1 moves the weight of MAE (q = 1) to harder examples, q < 1 to easier ones.

    Args:
        a: at least 1.
        q: above 0; a^q is at most exp(80).

    Raises:
        ValueError: a parameter is out of its range.

    Reference: Zhou et al., Asymmetric Loss Functions for Learning with Noisy Labels, arXiv 2106.03110.
    """

    a: float
    q: float
    family: ClassVar[str] = "aul"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.a >= 1, "a", "a >= 1")
        require(self, self.q > 0, "q", "q > 0")
        require(self, self.q * math.log(self.a) <= LARGEST_LOG, "q", "a^q to be at most exp(80), for the range of fp32")
        require(self, self.q >= LEAST_POWER, "q", f"q to be at least {LEAST_POWER}, as f has no digits in fp32 below")

    def weight(self, p: Tensor) -> Tensor:
        # At p = 1 with a = 1 and q < 1, 0 times an infinity that is the weaker.
        return 2 * p * torch.where(p == 1, torch.zeros_like(p), (1 - p) * (self.a - p) ** (self.q - 1))


@dataclasses.dataclass(frozen=True)
class AGCE(EDF):
    """Asymmetric generalised cross entropy: f(p) = ((a + 1)^q - (a + p)^q) / q, w(p) = 2 p (1 - p) (a + p)^(q - 1).

    For many wrong labels. It is GCE at a = 0, and closer to MAE the larger a is; q > 1 moves the weight to easier examples.

    Args:
        a: at least 0.
        q: above 0; (a + 1)^q is at most exp(80).

    Raises:
        ValueError: a parameter is out of its range.

    Reference: Zhou et al., Asymmetric Loss Functions for Learning with Noisy Labels, arXiv 2106.03110.
    """

    a: float
    q: float
    family: ClassVar[str] = "agce"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.a >= 0, "a", "a >= 0")
        require(self, not 0 < self.a < TINY, "a", "a to be 0 or a normal number of fp32")
        require(self, self.q > 0, "q", "q > 0")
        require(self, self.q * math.log1p(self.a) <= LARGEST_LOG, "q", "(a + 1)^q to be at most exp(80), for the range of fp32")
        require(self, self.q >= LEAST_POWER, "q", f"q to be at least {LEAST_POWER}, as f has no digits in fp32 below")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * torch.where(p == 0, torch.zeros_like(p), p * (self.a + p) ** (self.q - 1))


@dataclasses.dataclass(frozen=True)
class AEL(EDF):
    """Asymmetric exponential loss: f(p) = exp(-p / a), w(p) = (2 / a) p (1 - p) exp(-p / a).

    For many wrong labels. The smaller a is, the harder the examples that count most. A fitted example reports exp(-1 / a),
    not 0, as published.

    Args:
        a: above 0.

    Raises:
        ValueError: `a` is not above 0.

    Reference: Zhou et al., Asymmetric Loss Functions for Learning with Noisy Labels, arXiv 2106.03110.
    """

    a: float
    family: ClassVar[str] = "ael"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.a > 0, "a", "a > 0")
        require(self, self.a >= TINY, "a", "a to be a normal number of fp32")

    def weight(self, p: Tensor) -> Tensor:
        return 2 / self.a * p * (1 - p) * torch.exp(-p / self.a)


@dataclasses.dataclass(frozen=True)
class JS(EDF):
    """Jensen-Shannon divergence of the one-hot label, weighted pi, and the softmax, divided by -(1 - pi) log(1 - pi).

    With m = pi + (1 - pi) p and q = 1 - p,

        f(p) = (-m log m + (1 - pi) (p log p - q log(1 - pi))) / (-(1 - pi) log(1 - pi))
        w(p) = 2 p (1 - p) log(1 + pi / ((1 - pi) p)) / -log(1 - pi)

    For noisy labels: pi moves from cross entropy (0) to MAE (1).

    Args:
        pi: in (0, 1).

    Raises:
        ValueError: `pi` is not in (0, 1).

    Reference: Englesson and Azizpour, Generalized Jensen-Shannon Divergence Loss for Learning with Noisy Labels, arXiv
    2105.04522.
    """

    pi: float = 0.5
    family: ClassVar[str] = "js"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.pi < 1, "pi", "0 < pi < 1")
        require(self, self.pi >= LEAST_POWER, "pi", f"pi to be at least {LEAST_POWER}, as f has no digits in fp32 below")

    def weight(self, p: Tensor) -> Tensor:
        # p log(1 + pi / ((1 - pi) p)), 0 at p = 0.
        rest = 1 - self.pi
        logs = torch.xlogy(p, rest * p + self.pi) - torch.xlogy(p, rest * p)
        return 2 * (1 - p) * logs / -math.log1p(-self.pi)


@dataclasses.dataclass(frozen=True)
class SelfPaced(EDF):
    """Self-paced cross entropy, hard form: f(p) = min(-log p, threshold), w(p) = 2 (1 - p) where -log p < threshold, else 0.

    For curricula: only examples that are easy enough count; raise the threshold as training goes on.

    Args:
        threshold: above 0, in nats: examples with p > exp(-threshold) count.

    Raises:
        ValueError: `threshold` is not above 0, or is less than fp32 holds.

    Reference: Kumar et al., Self-Paced Learning for Latent Variable Models, NIPS 2010.
    """

    threshold: float
    family: ClassVar[str] = "self_paced"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.threshold > 0, "threshold", "threshold > 0")
        require(self, self.threshold >= TINY, "threshold", "threshold to be a normal number of fp32")

    def weight(self, p: Tensor) -> Tensor:
        return torch.where(-p.log() < self.threshold, 2 * (1 - p), torch.zeros_like(p))


@dataclasses.dataclass(frozen=True)
class SelfPacedLinear(EDF):
    """Self-paced cross entropy, linear form: w(p) = 2 (1 - p) max(0, 1 + log p / threshold).

    For curricula, as SelfPaced but without its jump. The reported value is -max(0, 1 + log p / threshold) log p; it holds the
    first factor constant, so its derivative is not the gradient.

    Args:
        threshold: above 0, in nats: examples with p > exp(-threshold) count.

    Raises:
        ValueError: `threshold` is not above 0, or is less than fp32 holds.

    Reference: Jiang et al., Easy Samples First: Self-paced Reranking for Zero-Example Multimedia Search, ACM MM 2014.
    """

    threshold: float
    family: ClassVar[str] = "self_paced_linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, self.threshold > 0, "threshold", "threshold > 0")
        require(self, self.threshold >= TINY, "threshold", "threshold to be a normal number of fp32")

    def weight(self, p: Tensor) -> Tensor:
        return 2 * (1 - p) * (1 + p.log() / self.threshold).clamp(min=0)
