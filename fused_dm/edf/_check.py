"""`check`: whether an EDF is sound, and in words what it does."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._density import EDF
from ._measure import Measures, exp, measure

# Margins from p = 1e-35 to 1 - 1e-35, densest in the middle; and the ends, p = 0 and p = 1.
_MARGINS = (*(sign * 80.0 * (i / 40) ** 2 for sign in (-1, 1) for i in range(41)), -math.inf, math.inf)
# Two forms of the same mathematics differ by rounding, relative to 1 + |log w|: this many units in the last place at most.
_UNITS = 64
_HARD, _MIDDLING, _EASY = 0.05, 0.5, 0.95
# The margin at which p, or 1 - p, is 1e-9, and the log of a share of the largest weight that is called none.
_FAR, _LEAST = 9 * math.log(10), -5 * math.log(10)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found; `print` it.

    Attributes:
        emphasis: the name of what was checked.
        compared: whether the Triton form was run, and agrees.
        difference: the largest difference of log w between the forms in fp64, relative to 1 + |log w|; None if not compared.
        notes: what to know before training with it.
        words: what it does to easy, middling and hard examples.
    """

    emphasis: str
    compared: bool
    difference: float | None
    notes: tuple[str, ...]
    words: str

    def __str__(self) -> str:
        if self.compared:
            forms = (
                f"The torch and the Triton form agree: log w differs by {self.difference:.1g} at most, relative to 1 + |log w|."
            )
        else:
            forms = "The torch form alone was checked."
        return "\n".join([f"{self.emphasis}: sound.", forms, self.words, *(f"Note: {note}" for note in self.notes)])


def check(emphasis: EDF | Callable[[Tensor, Tensor], Tensor]) -> Report:
    """Check an EDF and say in words what it does to easy, middling and hard examples.

    Looked at from p = 1e-35 to 1 - 1e-35, and at p = 0 and 1: that log w is a tensor of the right shape and never nan (a
    negative weight has no logarithm), that it is finite at the ends, that f, if there is one, falls with p and has the slope
    that the weight says, and, where the kernels can run (on a GPU, or in Triton's interpreter under TRITON_INTERPRET=1), that
    the Triton form gives the same weights and values.

    Args:
        emphasis: an EDF, or a function log_weight(log_p, log_q).

    Returns:
        Report; `print` it. What can be meant, such as an infinite weight at p = 0, is among its notes.

    Raises:
        TypeError: not an EDF or a function.
        ValueError: a shape or dtype is wrong, a weight is nan, the function changes its arguments, or the two forms disagree.

    Example:
        >>> from fused_dm import edf
        >>> print(edf.check(lambda log_p, log_q: 20 * ((log_p + log_q).exp() - 0.25)).words.split(". ")[0])
        Middling examples count most
    """
    neither = not callable(emphasis) and (not isinstance(emphasis, EDF) or type(emphasis) is EDF)
    if neither or isinstance(emphasis, type):
        raise TypeError(f"check: expected an EDF or a function log_weight(log_p, log_q), got {emphasis!r}")
    name = str(emphasis) if isinstance(emphasis, EDF) else getattr(emphasis, "__name__", repr(emphasis))
    log_weight = emphasis.log_weight if isinstance(emphasis, EDF) else emphasis
    margin = torch.tensor(sorted(set(_MARGINS)), dtype=torch.float64, device="cpu")
    log_p, log_q = _logs(margin)
    log_w = _weights(name, log_weight, log_p, log_q)
    _weights(name, log_weight, log_p.float(), log_q.float())
    notes = _ends(log_w) + _slope(emphasis, margin)
    compared, difference = False, None
    if isinstance(emphasis, EDF) and emphasis.fused:
        device = _device()
        if device is None:
            notes += ("the Triton form was not run: that takes a GPU, or TRITON_INTERPRET=1 set before the first import.",)
        else:
            compared, difference = True, _compare(name, emphasis, margin, log_w, device)
    elif isinstance(emphasis, EDF):
        notes += ("it has no kernel of its own: it runs on the margins, at a cost of order N.",)
    return Report(name, compared, difference, notes, _words(measure(log_weight), log_weight))


def _logs(margin: Tensor) -> tuple[Tensor, Tensor]:
    return F.logsigmoid(margin).clamp(min=-1e30), F.logsigmoid(-margin).clamp(min=-1e30)


def _log_weight_at(emphasis: EDF, margin: Tensor) -> Tensor:
    return emphasis.log_weight(*_logs(margin)).double()


def _weights(name: str, log_weight: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    given = log_p.clone(), log_q.clone()
    log_w = log_weight(*given)
    if not (torch.equal(given[0], log_p) and torch.equal(given[1], log_q)):
        raise ValueError(f"{name}: expected log_weight to leave log_p and log_q as they are; it changes them in place")
    if not isinstance(log_w, Tensor) or log_w.shape != log_p.shape or not log_w.dtype.is_floating_point:
        got = f"{log_w.dtype} {tuple(log_w.shape)}" if isinstance(log_w, Tensor) else repr(log_w)
        raise ValueError(f"{name}: expected log_weight to return a float tensor of shape {tuple(log_p.shape)}, got {got}")
    if log_w.isnan().any():
        at = int(log_w.isnan().nonzero()[0])
        raise ValueError(
            f"{name}: expected log w to be a number, got nan at p = {log_p[at].exp().item():.3g} (log p = "
            f"{log_p[at].item():.3g}, log q = {log_q[at].item():.3g}); is the weight negative there, or an infinity times 0?"
        )
    return log_w.double()


def _ends(log_w: Tensor) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    for end, at in (("0", 0), ("1", -1)):
        if log_w[at] > 709:
            notes += (f"w is infinite at p = {end}: such an example outweighs the rest of its batch.",)
    inner = log_w[1:-1].max().item()
    if inner > 88:
        notes += (f"log w reaches {inner:.3g}: in fp32 it overflows, unless what divides it is as large.",)
    return notes


def _slope(emphasis: object, margin: Tensor) -> tuple[str, ...]:
    """Whether f has the slope that the weight says: w = 2 p q |df/dp| = 2 |df/dmargin|."""
    if not isinstance(emphasis, EDF) or not emphasis.has_loss:
        return ()
    # Where f has digits left, and off the round p at which an f in pieces has its corners.
    margin = (margin[margin.abs() < 20] + 0.0137).requires_grad_()
    log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(emphasis.loss(log_p, log_q).sum(), margin)
    weight = torch.exp(emphasis.log_weight(log_p, log_q)).detach()
    if ((2 * slope.abs() - weight).abs() <= 1e-6 * weight + 1e-12).all() and (slope <= 0).all():
        return ()
    return ("the gradient is not the derivative of the reported f: right only if f holds a factor constant by definition.",)


def _device() -> str | None:
    """Where the kernels can run."""
    from .. import _validation

    if not _validation.has_triton():
        return None
    for device in _validation.TRITON_DEVICES:
        if getattr(torch, device).is_available():
            return device
    return "cpu" if _validation.interprets() else None


def _compare(name: str, emphasis: EDF, margin: Tensor, log_w: Tensor, device: str) -> float:
    """The largest difference of log w between the forms in fp64; in fp32 too, they must agree within rounding."""
    f = emphasis.loss(F.logsigmoid(margin), F.logsigmoid(-margin))
    # On which side of a jump a margin lies is a matter of rounding.
    below, above = (_log_weight_at(emphasis, margin + side * 1e-5 * (1 + margin.abs())) for side in (-1, 1))
    jump = _apart(below, above) > 1e-2 * (1 + margin.abs())
    difference = math.inf
    for dtype in (torch.float32, torch.float64):
        got_w, got_f = _from_kernel(emphasis, margin, device, dtype)
        # An infinity is the same however it is written, and so is a weight that no batch can notice.
        same = jump | (got_w < -80) & (log_w < -80) | (got_w > 709) & (log_w > 709)
        apart = _apart(torch.where(same, log_w, got_w), log_w)
        # The margin's own rounding shows where log w or f is steep.
        allowed = _UNITS * torch.finfo(dtype).eps * (1 + margin.abs().clamp(max=100))
        _agree(name, "log w", apart > allowed, margin, got_w, log_w)
        if emphasis.has_loss:
            _agree(name, "f", _apart(got_f, f) > allowed, margin, got_f, f)
        difference = apart.max().item()
    return difference


def _from_kernel(emphasis: EDF, margin: Tensor, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log w and f at each margin, from the forward kernel; fp64 on the CPU."""
    from .. import _operators

    # Two classes, the label's logit the margin and the other 0: the kernel's margin is exact.
    logits = torch.stack([margin, torch.zeros_like(margin)], 1)
    logits[-1] = torch.tensor([0.0, -math.inf], device="cpu")
    target = torch.zeros(len(margin), dtype=torch.int64, device=device)
    params = torch.tensor((0.0, *emphasis.params), dtype=torch.float64, device=device)
    one = torch.ones((), dtype=torch.float64, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        # The interpreter computes with numpy, which warns where a batch's total overflows; the rows are what is read.
        warnings.simplefilter("ignore", RuntimeWarning)
        given = (logits.to(device, dtype), target, None, None, params, one, emphasis.family, -100)
        rows = _operators.triton_loss(*given)[1]
    return rows[3].double().cpu(), rows[6].double().cpu()


def _apart(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact| relative to 1 + |exact|, inf where one of them alone is nan or infinite."""
    return torch.where(got == exact, 0.0, (got - exact).abs() / (1 + exact.abs())).nan_to_num(math.inf, math.inf)


def _agree(name: str, what: str, wrong: Tensor, margin: Tensor, got: Tensor, exact: Tensor) -> None:
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: the two forms disagree: at p = {torch.sigmoid(margin[at]).item():.3g} (log p - log q = "
            f"{margin[at].item():.3g}) the torch form has {what} = {exact[at].item():.9g} and the Triton form "
            f"{got[at].item():.9g}"
        )


def _words(measures: Measures, log_weight: Callable[[Tensor, Tensor], Tensor]) -> str:
    p = torch.tensor([_HARD, _MIDDLING, _EASY], dtype=torch.float64, device="cpu")
    logs = [value.item() for value in log_weight(p.log(), torch.log1p(-p))]
    kinds = ["hard", "middling", "easy"]
    at = max(range(3), key=lambda i: logs[i])
    if measures.log_peak == -math.inf:
        return "No example counts."
    nowhere = logs[at] == -math.inf
    shares = [0.0 if nowhere else exp(value - logs[at]) for value in logs]
    others = [i for i in range(3) if i != at]
    if measures.log_peak - measures.log_trough < 0.05:
        return "Hard, middling and easy examples count alike."
    if nowhere:
        text = "Examples at " + " and at ".join(f"p = {value:g} ({kind})" for value, kind in zip(p, kinds, strict=True))
        text += " do not count, others do. "
    elif min(shares) > 0.95:
        text = "Hard, middling and easy examples count about alike. "
    else:
        text = f"{kinds[at].capitalize()} examples count most. An example at p = {p[at]:g} has weight 1, "
        text += " and ".join(f"one at p = {p[i]:g} ({kinds[i]}) {shares[i]:.2g}" for i in others) + ". "
    text += f"The weight is largest at p = {measures.mode:.3g}. "
    ends = torch.tensor([-_FAR, _FAR], dtype=torch.float64, device="cpu")
    zero, one = (value.item() - measures.log_peak for value in log_weight(*_logs(ends)))
    text += f"Hopeless examples, which wrong labels are (p = 1e-9), {_end(zero)}; fitted ones (1 - p = 1e-9) {_end(one)}."
    return text


def _end(log_share: float) -> str:
    if log_share < _LEAST or math.isnan(log_share):
        return "do not count"
    return "count most" if log_share > -0.05 else f"keep {100 * exp(log_share):.2g} % of the largest weight"
