"""The definition, in plain PyTorch: what every other implementation is tested against.

One row of logits z with label y has p = softmax(z)[y], q = 1 - p and, with the emphasis w(p),

    g = (softmax(z) - onehot(y)) / (2 q + eps) * w(p)

A batch with row weights c has the gradient dL/dz_i = c_i g_i / D and the value sum_i c_i r(p_i) / D, where r is the
closed form f(p) of the loss if the EDF has one and -w(p) log p if not (Wang et al., arXiv 1905.11233). The gradient is
defined, not the derivative of the value.

The module imports nothing of the package. It takes any float dtype, computes in fp32 at least, and materialises
everything; in fp64 it is the truth for the tests.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT32_TINY = torch.finfo(torch.float32).tiny
LOG_FLOOR = math.log(1e-8)
# A weight below the least normal fp64 is 0 beside an infinite -log p.
LOG_LEAST = math.log(torch.finfo(torch.float64).tiny)


class ReferenceOutput(NamedTuple):
    """`loss` carries the gradient; the others are of the rows, but for `sum_weight`, 0-d fp64."""

    loss: Tensor
    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor


class _Defined(torch.autograd.Function):
    """A value, () or (N,), with a gradient that is given, (N, V)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logits, value, gradient = inputs
        ctx.per_row = value.dim() == 1
        ctx.save_for_backward(logits, gradient)
        # The same tensors: torch.vmap notes the batch dimensions of those that were saved last for both.
        ctx.save_for_forward(logits, gradient)

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None, None]:
        logits, gradient = ctx.saved_tensors
        return _Once.apply(logits, gradient, dvalue), None, None

    @staticmethod
    def jvp(ctx: Any, dlogits: Tensor, *_: Any) -> Tensor:
        _, gradient = ctx.saved_tensors
        return (gradient * dlogits).sum(1 if ctx.per_row else None)


class _Once(torch.autograd.Function):
    """The gradient times dvalue, with 0 where the gradient is 0; it has no derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, gradient: Tensor, dvalue: Tensor) -> Tensor:
        return torch.where(gradient == 0, 0, gradient * dvalue.unsqueeze(-1)).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, ddlogits: Tensor) -> None:
        raise RuntimeError("dm_loss: a second derivative was asked for; the gradient is defined, not derived, and has none")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError("dm_loss: a second derivative was asked for; the gradient is defined, not derived, and has none")


def _literal(logits: Tensor, label: Tensor, emphasis: Any, eps: float | Tensor) -> tuple[Tensor, ...]:
    """log p, log q, log w and the direction over (2 q + eps), as the formula is written."""
    softmax = torch.softmax(logits, 1)
    p = softmax.gather(1, label)[:, 0]
    onehot = torch.zeros_like(logits).scatter(1, label, 1.0)
    direction = (softmax - onehot) / (2 * (1 - p) + eps)[:, None]
    return p.clamp(min=FLOAT32_TINY).log(), torch.log1p(-p), emphasis.weight(p).double().log(), direction


def _stable(logits: Tensor, label: Tensor, emphasis: Any, eps: float | Tensor) -> tuple[Tensor, ...]:
    """The same from the margin z_y - log sum_{j != y} exp(z_j), where nothing cancels."""
    margin, others = _exclusive(logits, label)
    log_p, log_q = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    log_weight = emphasis.log_weight if hasattr(emphasis, "log_weight") else emphasis
    log_w = log_weight(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)).double()
    q = torch.sigmoid(-margin)
    # Where q and eps are both 0, the quotient is nan.
    norm = torch.where(torch.as_tensor(eps, device=q.device) == 0, 0.5, q / (2 * q + eps))
    direction = norm[:, None] * others.scatter(1, label, -1.0)
    direction = torch.where((margin == torch.inf)[:, None], 0, direction)
    return log_p, log_q, torch.where(margin.isnan(), margin.double(), log_w), direction


def _exclusive(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The margin (N,), and the softmax over the classes other than the label (N, V), 0 for the label."""
    others = logits.scatter(1, label, -torch.inf)
    top = others.amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    exps = torch.exp(others - top)
    total = exps.sum(1, keepdim=True)
    label_logit = logits.gather(1, label)
    lead = torch.where(label_logit == torch.inf, torch.nan, label_logit) - top
    return (lead - total.log())[:, 0], exps / total


def _capped(logits: Tensor, softcap: float | Tensor) -> Tensor:
    """c tanh(z / c), whose derivative keeps its digits where tanh is near 1 or -1."""
    ratio = logits / softcap
    # The same number, with the derivative 4 s(2 x) s(-2 x) for s = sigmoid, whose smaller factor is not 1 minus the other.
    smooth = torch.where(ratio < 0, 2 * torch.sigmoid(2 * ratio) - 1, 1 - 2 * torch.sigmoid(-2 * ratio))
    return softcap * (torch.tanh(ratio).detach() + (smooth - smooth.detach()))


def _transformed(logits: Tensor, logit_scale: float | Tensor | None, softcap: float | Tensor | None) -> Tensor:
    if logit_scale is not None:
        logits = logits * logit_scale
    return logits if softcap is None else _capped(logits, softcap)


def dm_loss(
    logits: Tensor,
    target: Tensor,
    emphasis: Any,
    *,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum_weight",
    normalizer: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    form: str = "stable",
) -> ReferenceOutput:
    """The DM loss of rows of logits, from the definition.

    Args:
        logits: (N, V), any float dtype.
        target: (N,), any integer dtype; every label is in [0, V) or `ignore_index`.
        emphasis: an EDF, or for the stable form any callable log_weight(log_p, log_q).
        weight: (V,) class weights.
        sample_weight: (N,) weights of the rows.
        ignore_index: rows with this label have no gradient and are in no sum.
        reduction: what D is: "sum_weight" (1e-8 + sum of c w), "mean" (sum of c), "sum" (`normalizer`, or 1), or "none",
            which returns the rows with D = 1.
        normalizer: D for reduction "sum".
        eps: added to 2 q; None means 0 for an EDF with a closed form and 1e-6 for the others.
        softcap: c in c tanh(z / c), by which the logits are replaced, after `logit_scale`.
        logit_scale: s in s z, by which the logits are replaced.
        form: "literal", the formula as it is written, or "stable", from the margin.

    Returns:
        ReferenceOutput; the loss is fp32, or fp64 for fp64 logits.
    """
    closed_form: Callable | None = emphasis.loss if getattr(emphasis, "has_loss", False) else None
    eps = (0.0 if closed_form else 1e-6) if eps is None else eps
    if logit_scale is not None or softcap is not None:
        logits = logits if logits.dtype == torch.float64 else logits.float()
    # Torch takes no whole number beyond 64 bits.
    softcap, logit_scale = (float(c) if isinstance(c, int) else c for c in (softcap, logit_scale))
    target = target.long()
    valid = target != ignore_index
    label = torch.where(valid, target, 0)[:, None]
    c = valid.double()
    if weight is not None:
        c = c * weight.double()[torch.where(valid, label[:, 0], 0)]
    if sample_weight is not None:
        c = torch.where(valid, c * sample_weight.double(), 0)
    counts = c != 0
    z = logits.detach()
    if logit_scale is not None or softcap is not None:
        z = _transformed(z, logit_scale, softcap)
        # A row that does not count may hold anything, and its derivative is 0.
        logits = _transformed(torch.where(counts[:, None], logits, 0), logit_scale, softcap)
    z = z if z.dtype == torch.float64 else z.float()
    log_p, log_q, log_w, direction = {"literal": _literal, "stable": _stable}[form](z, label, emphasis, eps)

    # Weights that are divided by their sum are kept relative to the largest, so that none overflows.
    scale = torch.zeros((), dtype=torch.float64, device=z.device)
    if reduction == "sum_weight":
        counted = torch.where(counts & (log_w > LOG_FLOOR), log_w, LOG_FLOOR)
        scale = torch.nn.functional.pad(counted, (0, 1), value=LOG_FLOOR).amax()
    w = torch.exp(log_w - scale)
    if closed_form:
        value = closed_form(log_p, log_q).double() * torch.exp(-scale)
    else:
        value = torch.where(log_p == 0, 0, -w * log_p)
        # Whatever w is relative to.
        value = torch.where(log_p == -torch.inf, torch.where(log_w < LOG_LEAST, 0, -log_p * (w + 1)), value)
    cw = torch.where(counts, c * w, 0)
    relative_sum = 1e-8 * torch.exp(-scale) + cw.sum()
    if reduction == "sum_weight":
        divisor = relative_sum
    elif reduction == "mean":
        divisor = torch.where(counts.any(), c.sum(), 1)
    else:
        divisor = torch.as_tensor(1.0 if normalizer is None else normalizer, dtype=torch.float64, device=z.device)
    value = torch.where(counts, c * value, 0)
    gradient = torch.where(counts[:, None] & (direction != 0), (cw / divisor).to(z.dtype)[:, None] * direction, 0)
    value = value if reduction == "none" else value.sum()
    # 0 where no row counts, also if their number divides.
    value = (value / torch.where((value == 0) & (divisor == 0), 1, divisor)).to(z.dtype)
    others = z.scatter(1, label, -torch.inf)
    return ReferenceOutput(
        loss=_Defined.apply(logits, value, gradient),
        example_weight=torch.where(counts, cw / divisor, 0).to(z.dtype),
        target_prob=torch.where(valid, log_p.exp(), torch.nan),
        sum_weight=relative_sum * torch.exp(scale),
        correct=valid & ~log_p.isnan() & (z.gather(1, label) >= others).all(1),
    )


def margin(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """z_y - log sum_{j != y} exp(z_j) of rows of logits (N, V), by ordinary autograd; nan for ignored rows."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    valid = target != ignore_index
    label = torch.where(valid, target, 0)[:, None]
    others = z.scatter(1, label, -torch.inf)
    no_other = (others == -torch.inf).all(1)
    lse = torch.logsumexp(torch.where(no_other[:, None], 0, others), 1)
    label_logit = z.gather(1, label)[:, 0]
    margins = torch.where(no_other, label_logit.detach() + torch.inf, label_logit - lse)
    return torch.where(valid, margins, torch.nan)
