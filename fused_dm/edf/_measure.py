"""Numbers about a weight w(p): where it is largest, its integral and variance, and its peak ratio.

Everything is done in the logarithm of w over the margin m, p = sigmoid(m), in fp64. Over p an integrand may be infinite at
both ends; over the margin it decays exponentially wherever the integral exists, so a substitution m = sinh(t) brings the
ends within reach, and whatever has not decayed there diverges.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# sinh(20) = 2.4e8: p^(alpha - 1) is integrated for alpha above 1e-6.
_END = 20.0
# Nodes and weights on [-1, 1] of Kronrod's rule of 15 points, and of Gauss's rule of 7, which is every other of them.
_NODES = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691258379,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
    0.0,
)
_KRONROD = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
    0.209482141084727828012999174891714,
)
_GAUSS = (
    0.129484966168869693270611432679082,
    0.279705391489276667901467771423780,
    0.381830050505118944950369775488975,
    0.417959183673469387755102040816327,
)


class Measures(NamedTuple):
    """What is known of a weight as a function of p in (0, 1)."""

    mode: float  # the p where w is largest, the lowest of several
    peaks: tuple[float, ...]  # of all peaks of at least a hundredth of the largest, from the lowest p
    log_integral: float  # inf where the integral diverges, -inf where w is 0
    log_variance: float  # of w(p) for p uniform over (0, 1)
    log_peak: float  # log of the largest w
    log_trough: float  # and of the smallest


def exp(value: float) -> float:
    """exp(value), inf where it overflows."""
    return math.exp(value) if value < 709.78 else math.inf


def _double(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _logs(margin: Tensor) -> tuple[Tensor, Tensor]:
    return F.logsigmoid(margin), F.logsigmoid(-margin)


# Panels bisected at a time. Counted: 3 for DM(beta=1000, lambd=1), 990 for a thousand steps, 4374 for sin(1e4 p); a weight
# computed in fp32 asks for more and more.
MOST_PANELS = 1 << 16


def _around(jumps: Sequence[float]) -> Tensor:
    """The t of jumps, given as p, and points between them, so that each interval has some."""
    p = _double((0.0, *sorted(jumps), 1.0))
    t = torch.asinh(p.log() - torch.log1p(-p)).clamp(-_END, _END)
    return torch.cat([t, (t[:-1] + t[1:]) / 2])


def _log_integral(log_weight: Callable[[Tensor, Tensor], Tensor], peak: float, around: Tensor) -> float:
    """log of the integral over p in (0, 1) of exp(log_weight), by bisecting panels until two rules agree.

    The panels are narrow around the peak, t = `peak`: those of a sharp one could miss it otherwise. Points `around` jumps are
    ends of panels.
    """

    def log_density(t: Tensor) -> tuple[Tensor, Tensor]:
        margin = torch.sinh(t)
        log_p, log_q = _logs(margin)
        return log_weight(log_p, log_q) + log_p + log_q, torch.cosh(t)

    nodes = torch.cat([-_double(_NODES), _double(_NODES[-2::-1])])
    kronrod = torch.cat([_double(_KRONROD), _double(_KRONROD[-2::-1])])
    gauss = torch.zeros_like(kronrod)
    gauss[1::2] = torch.cat([_double(_GAUSS), _double(_GAUSS[-2::-1])])
    steps = torch.logspace(-15, -1, 29, dtype=torch.float64, device="cpu")
    panels = torch.linspace(-_END, _END, 401, dtype=torch.float64, device="cpu")
    panels = torch.cat([panels, around, peak - steps, peak + steps]).clamp(-_END, _END).unique()
    left, right = panels[:-1], panels[1:]
    ends = log_density(panels)[0]
    top = ends.max().item()
    if top in (math.inf, -math.inf):
        # Either infinite in the middle of (0, 1), or 0 at every point looked at.
        return top
    if max(ends[0].item(), ends[-1].item()) > top - 40:
        return math.inf
    total = 0.0
    for _ in range(60):
        half = (right - left) / 2
        log_g, jacobian = log_density(left[:, None] + half[:, None] * (1 + nodes))
        values = torch.exp(log_g - top) * jacobian * half[:, None]
        by_kronrod = (values * kronrod).sum(1)
        error = (by_kronrod - (values * gauss).sum(1)).abs()
        rough = error > 1e-14 * max(total + by_kronrod.sum().item(), 1e-300)
        total += by_kronrod[~rough].sum().item()
        if not rough.any():
            break
        if rough.sum() > MOST_PANELS:
            # Rough everywhere, such as what is computed in fp32: halves are no better.
            total += by_kronrod[rough].sum().item()
            break
        left, right = left[rough], right[rough]
        middle = (left + right) / 2
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
    else:
        total += by_kronrod[rough].sum().item()
    return top + math.log(total) if total > 0 else -math.inf


class _Peak(NamedTuple):
    t: float
    log_weight: float


def _refined(values: Callable[[Tensor], Tensor], t: Tensor, at: int) -> _Peak:
    """The largest between the neighbours of t[at]; the ends are what they are."""
    if at not in (0, len(t) - 1):
        for _ in range(10):
            left, right = t[max(at - 1, 0)].item(), t[min(at + 1, len(t) - 1)].item()
            t = torch.linspace(left, right, 201, dtype=torch.float64, device="cpu")
            at = int(values(t).argmax())
    return _Peak(t[at].item(), values(t)[at].item())


def _peaks(log_weight: Callable[[Tensor, Tensor], Tensor], around: Tensor) -> list[_Peak]:
    """The peaks of log_weight from the lowest t; of more than 16 the largest. Points `around` jumps are looked at too."""

    def values(t: Tensor) -> Tensor:
        return log_weight(*_logs(torch.sinh(t)))

    t = torch.cat([torch.linspace(-_END, _END, 8001, dtype=torch.float64, device="cpu"), around]).unique()
    given = values(t)
    nothing = given.new_full((1,), -math.inf)
    # The first of several that are equal.
    rises = (given > torch.cat([nothing, given[:-1]])) & (given >= torch.cat([given[1:], nothing]))
    found = rises.nonzero()[:, 0].tolist() or [int(given.argmax())]
    found = sorted(found, key=lambda at: -given[at].item())[:16]
    return [_refined(values, t, at) for at in sorted(found)]


def _largest(peaks: list[_Peak]) -> _Peak:
    """The largest, or of those that differ by rounding the first."""
    top = max(peak.log_weight for peak in peaks)
    least = top - 1e-12 * (1 + abs(top)) if math.isfinite(top) else top
    return next((peak for peak in peaks if peak.log_weight >= least), peaks[0])


def _distinct(log_weight: Callable[[Tensor, Tensor], Tensor], peaks: list[_Peak], top: float) -> tuple[float, ...]:
    """The p of peaks of at least a hundredth of the largest, between which w falls by a twentieth at least."""
    kept: list[_Peak] = []
    for peak in peaks:
        if not peak.log_weight > top - math.log(100):
            continue
        if kept:
            between = torch.linspace(kept[-1].t, peak.t, 1001, dtype=torch.float64, device="cpu")
            dip = log_weight(*_logs(torch.sinh(between))).min().item()
            if dip > min(kept[-1].log_weight, peak.log_weight) - 0.05:
                kept[-1] = max(kept[-1], peak, key=lambda one: one.log_weight)
                continue
        kept.append(peak)
    return tuple(_p_of(peak) for peak in kept)


def _p_of(peak: _Peak) -> float:
    return torch.sigmoid(torch.sinh(_double((peak.t,)))).item()


def of_rows(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The function for tensors of any shape: it is given them as (N,), as a loss gives it rows."""

    def log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
        got = function(log_p.reshape(-1), log_q.reshape(-1))
        if not isinstance(got, Tensor) or got.shape != (log_p.numel(),):
            shown = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(f"expected log_weight to return a tensor of shape ({log_p.numel()},), got {shown}")
        return got.reshape(log_p.shape)

    return log_weight


def measure(log_weight: Callable[[Tensor, Tensor], Tensor], jumps: Sequence[float] = ()) -> Measures:
    """Measure the weight whose logarithm is `log_weight(log_p, log_q)` on fp64 tensors (N,), with `jumps` at some p."""
    around, log_weight = _around(jumps), of_rows(log_weight)
    with torch.no_grad():
        found = _peaks(log_weight, around)
        largest = _largest(found)
        peak, log_peak = largest
        mode = _p_of(largest)
        log_trough = -_largest(_peaks(lambda log_p, log_q: -log_weight(log_p, log_q), around)).log_weight
        if log_peak == log_trough:
            return Measures(mode, (mode,), log_peak, -math.inf, log_peak, log_trough)
        peaks = _distinct(log_weight, found, log_peak)
        log_mean = _log_integral(log_weight, peak, around)
        if log_mean in (math.inf, -math.inf):
            return Measures(mode, peaks, log_mean, log_mean, log_peak, log_trough)

        def log_square(log_p: Tensor, log_q: Tensor) -> Tensor:
            log_w = log_weight(log_p, log_q)
            distance = torch.where(log_w == -math.inf, -math.inf, -(log_w - log_mean).abs())
            return 2 * (log_w.clamp(min=log_mean) + torch.log(-torch.expm1(distance)))

        return Measures(mode, peaks, log_mean, _log_integral(log_square, peak, around), log_peak, log_trough)
