"""`check`: whether an EDF is sound, and in words what it does."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._density import EDF
from ._measure import Measures, exp, measure, of_rows

# Margins from p = 1e-35 to 1 - 1e-35, densest in the middle; and the ends, p = 0 and p = 1.
_MARGINS = (*(sign * 80.0 * (i / 40) ** 2 for sign in (-1, 1) for i in range(41)), -math.inf, math.inf)
# Two forms of the same mathematics differ by rounding, relative to 1 + |log w|: this many units in the last place at most.
_UNITS = 64
_HARD, _MIDDLING, _EASY = 0.05, 0.5, 0.95
# The margin at which p, or 1 - p, is 1e-9, and the log of a share of the largest weight that is called none.
_FAR, _LEAST = 9 * math.log(10), -5 * math.log(10)
# The log of a largest weight beside which the 1e-8 that is added to the sum of weights is more than a thousandth.
_SMALL = math.log(1e-5)
# A weight of less than this share of the largest is not looked at for its digits.
_UNSEEN = -40.0


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

    Looked at from p = 1e-35 to 1 - 1e-35, and at p = 0 and 1: that log w and f, if there is one, are tensors of the right
    shape and never nan (a negative weight has no logarithm); whether w is finite at the ends, large beside the 1e-8 that is
    added to the sum of weights, the same in fp32 as in fp64, and the same whatever other examples are in the batch; whether f
    falls with p and has the slope that the weight says; and, where the kernels can run (on a GPU, or in Triton's interpreter
    under TRITON_INTERPRET=1), that the Triton form gives the same weights and values.

    Args:
        emphasis: an EDF, or a function log_weight(log_p, log_q).

    Returns:
        Report; `print` it. What can be meant, such as an infinite weight at p = 0, is among its notes.

    Raises:
        TypeError: not an EDF or a function.
        ValueError: a shape or dtype is wrong, a weight or an f is nan, the function changes its arguments, or the two forms
            disagree.

    Example:
        >>> from fused_dm import edf
        >>> print(edf.check(lambda log_p, log_q: 20 * ((log_p + log_q).exp() - 0.25)).words.split(". ")[0])
        Middling examples count most
    """
    neither = not callable(emphasis) and (not isinstance(emphasis, EDF) or type(emphasis) is EDF)
    if neither or isinstance(emphasis, type):
        raise TypeError(f"check: expected an EDF or a function log_weight(log_p, log_q), got {emphasis!r}")
    if isinstance(emphasis, EDF):
        emphasis.check_fields()
    name = str(emphasis) if isinstance(emphasis, EDF) else getattr(emphasis, "__name__", repr(emphasis))
    given = emphasis.log_weight if isinstance(emphasis, EDF) else emphasis
    log_weight = of_rows(given)
    margin = torch.tensor(sorted(set(_MARGINS)), dtype=torch.float64, device="cpu")
    log_p, log_q = _logs(margin)
    log_w = _weights(name, given, log_p, log_q)
    notes = _of_its_own_p(log_weight, log_p, log_q)
    words = "It is no function of p alone."
    if not notes:
        measures = measure(log_weight)
        words = _words(measures, log_weight)
        notes = _ends(log_w) + _beside_the_floor(measures) + _in_fp32(name, log_weight, log_p, log_q, log_w)
    notes += _slope(name, emphasis, margin)
    compared, difference = False, None
    if isinstance(emphasis, EDF) and emphasis.fused:
        device = _device()
        if device is None:
            notes += ("the Triton form was not run: that takes a GPU, or TRITON_INTERPRET=1 set before the first import.",)
        else:
            compared, difference = True, _compare(name, emphasis, margin, log_w, device)
    elif isinstance(emphasis, EDF):
        notes += ("it has no kernel of its own: it runs on the margins, at a cost of order N.",)
    return Report(name, compared, difference, notes, words)


def _logs(margin: Tensor) -> tuple[Tensor, Tensor]:
    return F.logsigmoid(margin).clamp(min=-1e30), F.logsigmoid(-margin).clamp(min=-1e30)


def _log_weight_at(emphasis: EDF, margin: Tensor) -> Tensor:
    return emphasis.log_weight(*_logs(margin)).double()


def _weights(name: str, log_weight: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    given = log_p.clone(), log_q.clone()
    log_w = log_weight(*given)
    if not (torch.equal(given[0], log_p) and torch.equal(given[1], log_q)):
        raise ValueError(f"{name}: expected log_weight to leave log_p and log_q as they are; it changes them in place")
    return _numbers(name, "log_weight", "log w", log_w, log_p, log_q, "is the weight negative there, or an infinity times 0?")


def _numbers(name: str, function: str, what: str, got: object, log_p: Tensor, log_q: Tensor, hint: str) -> Tensor:
    """What a function of the user's returned, if it is a float tensor of the right shape without nan."""
    if not isinstance(got, Tensor) or got.shape != log_p.shape or not got.dtype.is_floating_point:
        shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
        raise ValueError(f"{name}: expected {function} to return a float tensor of shape {tuple(log_p.shape)}, got {shown}")
    if got.isnan().any():
        at = int(got.isnan().nonzero()[0])
        raise ValueError(
            f"{name}: expected {what} to be a number, got nan at p = {log_p[at].exp().item():.3g} (log p = "
            f"{log_p[at].item():.3g}, log q = {log_q[at].item():.3g}); {hint}"
        )
    return got.double()


def _ends(log_w: Tensor) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    inner = log_w[1:-1].max().item()
    if inner == math.inf:
        return ("w is infinite within (0, 1): the loss of a batch with such an example is nan.",)
    for end, at in (("0", 0), ("1", -1)):
        if log_w[at] > max(709, inner + 88):
            notes += (f"w is infinite at p = {end}: such an example outweighs the rest of its batch.",)
    if inner > 88:
        notes += (f"log w reaches {inner:.3g}: in fp32 it overflows, unless what divides it is as large.",)
    return notes


def _beside_the_floor(measures: Measures) -> tuple[str, ...]:
    if not -math.inf < measures.log_peak < _SMALL:
        return ()
    return (
        f'the largest log w is {measures.log_peak:.3g}: under "sum_weight" the 1e-8 that is added to the sum of weights makes '
        "gradients smaller; add a number to log w, or multiply the weight by one.",
    )


def _in_fp32(
    name: str, log_weight: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor, log_w: Tensor
) -> tuple[str, ...]:
    """Whether log w has digits in fp32: as many as the roundings of log p and log q leave it."""
    got = _weights(name, log_weight, log_p.float(), log_q.float())
    eps = torch.finfo(torch.float32).eps
    moved = [
        (_finite(log_weight(log_p * (1 + sign * 4 * eps), log_q * (1 + other * 4 * eps)).double()) - _finite(log_w)).abs()
        for sign, other in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    allowed = _UNITS * eps * (1 + log_w.abs()) + _UNITS * torch.stack(moved).amax(0)
    seen = (log_p > -1e30) & (log_q > -1e30) & (log_w > log_w[1:-1].max() + _UNSEEN)
    wrong = seen & ~((_finite(got) - _finite(log_w)).abs() <= allowed) & (got != log_w)
    if not wrong.any():
        return ()
    at = int(wrong.nonzero()[0])
    return (
        f"in fp32, in which logits of up to 32 bits are computed, log w has lost its digits at p = "
        f"{log_p[at].exp().item():.2g}, 1 - p = {log_q[at].exp().item():.2g}: {got[at].item():.6g}, and {log_w[at].item():.6g} "
        "in fp64. If 1 - p is made of log_p: log_q is log(1 - p) with all digits.",
    )


def _finite(values: Tensor) -> Tensor:
    return values.clamp(-1e30, 1e30)


def _of_its_own_p(log_weight: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> tuple[str, ...]:
    """Whether the weight of an example is the same again, and beside other examples."""
    log_w = log_weight(log_p, log_q)

    def same(at: Tensor) -> bool:
        got, exact = log_weight(log_p[at], log_q[at]), log_w[at]
        # Sums of a network, say, are rounded by the number of rows.
        return not (_apart(got.double(), exact.double()) > _UNITS**2 * torch.finfo(got.dtype).eps).any()

    every = torch.arange(len(log_p), device="cpu")
    if not same(every):
        return ("a second call gave the same p other weights.",)
    # In another order; those with the larger p alone; and one by one.
    others = [every * 37 % len(every), every[len(every) // 2 :], *every[10::20, None]]
    if not all(map(same, others)):
        return (
            "the weight of an example depends on which others it is computed with: those of its batch, or of a part of it.",
        )
    return ()


def _slope(name: str, emphasis: object, margin: Tensor) -> tuple[str, ...]:
    """Whether f falls with p, and has the slope that the weight says: w = 2 p q |df/dp| = 2 |df/dmargin|."""
    if not isinstance(emphasis, EDF) or not emphasis.has_loss:
        return ()
    logs = F.logsigmoid(margin), F.logsigmoid(-margin)
    given = logs[0].clone(), logs[1].clone()
    f = _numbers(name, "loss", "f", emphasis.loss(*given), *logs, "is it 0 times an infinite log?")
    if not (torch.equal(given[0], logs[0]) and torch.equal(given[1], logs[1])):
        raise ValueError(f"{name}: expected loss to leave log_p and log_q as they are; it changes them in place")
    inner = f[1:-1]
    rises = inner.diff() > 1e-9 * (1 + inner[:-1].abs())
    notes: tuple[str, ...] = ()
    if rises.any():
        at = int(rises.nonzero()[0]) + 1
        notes = (f"f rises with p at p = {torch.sigmoid(margin[at]).item():.3g}, where a loss would fall.",)
    # Where f has digits left, and off the round p at which an f in pieces has its corners.
    margin = (margin[margin.abs() < 20] + 0.0137).requires_grad_()
    log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
    with torch.enable_grad():
        total = emphasis.loss(log_p, log_q).sum()
        # That of a constant has no derivative.
        slope = torch.autograd.grad(total, margin)[0] if total.requires_grad else torch.zeros_like(margin)
    weight = torch.exp(emphasis.log_weight(log_p, log_q)).detach()
    if ((2 * slope.abs() - weight).abs() <= 1e-6 * weight + 1e-12).all() and (slope <= 0).all():
        return notes
    return (
        *notes,
        "the gradient is not the derivative of the reported f: right only if f holds a factor constant by definition.",
    )


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
    if measures.log_peak == -math.inf:
        return "No example counts."
    if measures.log_peak == math.inf:
        return f"The weight is infinite at p = {measures.mode:.3g}: beside such an example no other counts."
    if measures.log_peak - measures.log_trough < 0.05:
        return "Hard, middling and easy examples count alike."
    p = torch.tensor([_HARD, _MIDDLING, _EASY], dtype=torch.float64, device="cpu")
    kinds = ["hard", "middling", "easy"]
    logs = [value.item() for value in log_weight(p.log(), torch.log1p(-p))]
    # The largest weight from p = 1e-9 to 1 - 1e-9, as there may be none that is largest.
    mode = min(max(measures.mode, 1e-9), 1 - 1e-9)
    margin = torch.linspace(-_FAR, _FAR, 2001, dtype=torch.float64, device="cpu")
    margin = torch.cat([margin, torch.tensor([math.log(mode) - math.log1p(-mode)], dtype=torch.float64, device="cpu")])
    top = max(log_weight(*_logs(margin)).max().item(), *logs)
    shares = [0.0 if value == -math.inf else exp(value - top) for value in logs]
    at = max(range(3), key=lambda i: logs[i])
    others = [i for i in range(3) if i != at]
    if max(shares) == 0.0:
        text = "Examples at " + " and at ".join(f"p = {value:g} ({kind})" for value, kind in zip(p, kinds, strict=True))
        text += " do not count, others do. "
    elif min(shares) > 0.95:
        text = "Hard, middling and easy examples count about alike. "
    elif shares[at] > 0.5:
        text = f"{kinds[at].capitalize()} examples count most. An example at p = {p[at]:g} has {_percent(shares[at])} of the "
        text += "largest weight, " + " and ".join(f"one at p = {p[i]:g} ({kinds[i]}) {_percent(shares[i])}" for i in others)
        text += ". "
    else:
        near = measures.mode if measures.mode == mode else round(mode)
        listed = [f"one at p = {p[i]:g} ({kinds[i]}) has {_percent(shares[i])}" for i in range(3)]
        text = f"Examples near p = {near:.3g} count most. Of their weight, {listed[0]}, {listed[1]} and {listed[2]}. "
    text += f"The weight is largest at p = {measures.mode:.3g}"
    more = [f"p = {peak:.3g}" for peak in measures.peaks if peak != measures.mode]
    text += f", with another peak at {' and at '.join(more)}. " if more else ". "
    ends = torch.tensor([-_FAR, _FAR], dtype=torch.float64, device="cpu")
    zero, one = (value.item() - top for value in log_weight(*_logs(ends)))
    text += f"Hopeless examples, which wrong labels are (p = 1e-9), {_end(zero)}; fitted ones (1 - p = 1e-9) {_end(one)}."
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _end(log_share: float) -> str:
    if log_share < _LEAST or math.isnan(log_share):
        return "do not count"
    return "count most" if log_share > -0.05 else f"keep {100 * exp(log_share):.2g} % of the largest weight"
