"""The two ways to the loss of logits (N, V): through the margins in torch, and fused in Triton kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _cpu, _operators, _validation
from ._rows import (
    RowTerms,
    Totals,
    batch_totals,
    coefficients,
    compute_dtype,
    example_weights,
    mean_divisor,
    row_terms,
    row_values,
    row_weight,
)

# Logits whose gradient may be written in the forward pass and is then used up by the backward. fp16 has not the range for a
# gradient before its scale is known; fp64 is for checking, which runs a backward more than once.
IN_FORWARD = (torch.float32, torch.bfloat16)


class Emphasis(NamedTuple):
    """An EDF as the implementations take it."""

    family: str | None  # key of the families that have a fused form
    params: Tensor  # (1 + parameters,) fp64: eps, then the family's
    log_weight: Callable[..., Tensor]  # of log p, log q and the parameters
    loss: Callable[..., Tensor] | None


class Problem(NamedTuple):
    """A checked call, flattened to rows."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N,)
    weight: Tensor | None  # (V,)
    sample_weight: Tensor | None  # (N,)
    normalizer: Tensor | None  # () fp64
    emphasis: Emphasis
    reduction: str
    ignore_index: int
    return_output: bool
    inplace: bool  # the gradient, which is wanted, overwrites the logits
    transform: Tensor | None = None  # fp64: scale and, if there are two, softcap of the logits


class Received(NamedTuple):
    """What each row received, (N,), and the sum of weights, 0-d fp64."""

    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor


class Result(NamedTuple):
    """The loss, () or (N,) for reduction "none", and what the rows received where the problem asks for it."""

    loss: Tensor
    received: Received | None = None


def needs_gradient(logits: Tensor) -> bool:
    # Within torch.vmap a tensor does not tell whether it requires grad.
    return torch.is_grad_enabled() and (logits.requires_grad or _validation.is_batched(logits))


def _in_forward(problem: Problem) -> bool:
    """Whether the gradient, if one is wanted, may be written in the forward pass."""
    # Traced code cannot overwrite an input of its graph in the forward pass and then again in the backward.
    overwrites_twice = problem.inplace and torch.compiler.is_compiling()
    # The batches of torch.vmap share one buffer, which the first of their backwards would use up.
    shares = _validation.is_batched(problem.logits)
    return needs_gradient(problem.logits) and problem.logits.dtype in IN_FORWARD and not (overwrites_twice or shares)


def _valid(problem: Problem) -> Tensor:
    return problem.target != problem.ignore_index


def row_weights(problem: Problem) -> Tensor | None:
    """c of each row, (N,); None where every row has 1."""
    if problem.weight is None and problem.sample_weight is None:
        return None
    dtype = compute_dtype(problem.logits.dtype)
    return row_weight(problem.weight, problem.sample_weight, problem.target, _valid(problem), dtype)


def _normalizer(problem: Problem, weight: Tensor | None) -> Tensor | None:
    """The divisor, 0-d fp64, or None for the sum of weights."""
    if problem.reduction == "sum_weight":
        return None
    if problem.reduction == "mean":
        return mean_divisor(weight, _valid(problem))
    if problem.normalizer is not None:
        return problem.normalizer
    return torch.ones((), dtype=torch.float64, device=problem.logits.device)


@torch.no_grad()
def received(problem: Problem, margin: Tensor, lead: Tensor, log_weight: Tensor, sign: Tensor, totals: Totals) -> Received:
    valid = _valid(problem)
    prob = torch.where(valid, torch.sigmoid(margin), torch.full_like(margin, torch.nan))
    weights = example_weights(log_weight, sign, totals)
    correct = ~margin.isnan() & ((lead >= 0) | (margin == torch.inf))
    return Received(weights, prob, totals.sum_weight.clone(), valid & correct)


def _with(function: Callable[..., Tensor], params: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda log_p, log_q: function(log_p, log_q, *params)


def _terms(problem: Problem, margin: Tensor, weight: Tensor | None) -> RowTerms:
    emphasis, valid = problem.emphasis, _valid(problem)
    eps, *params = emphasis.params.unbind()
    log_weight = _with(emphasis.log_weight, params)
    loss = None if emphasis.loss is None else _with(emphasis.loss, params)

    def of(rows: slice) -> RowTerms:
        return row_terms(margin[rows], valid[rows], None if weight is None else weight[rows], eps, log_weight, loss)

    # A function of the user's is called once, by the thread that called us. A mode that looks at every torch call, such as a
    # tracer's, does not see those of other threads.
    in_pieces = margin.device.type == "cpu" and emphasis.family is not None and margin.numel() > _cpu.PIECE_ROWS
    seen = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or _validation.is_batched(problem.logits)
    if in_pieces and not seen:
        return RowTerms(*_cpu.in_pieces(of, margin.numel()))
    return of(slice(None))


@torch.no_grad()
def of_margins(problem: Problem, margin: Tensor) -> tuple[Tensor, RowTerms, Totals]:
    """The loss, the rows' numbers and the batch's divisor from the margins (N,), in torch; without a gradient."""
    emphasis, weight = problem.emphasis, row_weights(problem)
    terms = _terms(problem, margin.detach(), weight)
    totals = batch_totals(terms, _normalizer(problem, weight))
    loss = row_values(terms, totals.log_scale, emphasis.loss is not None)
    if problem.reduction != "none":
        loss = (loss.sum(dtype=torch.float64) / totals.divisor).to(loss.dtype)
    return loss, terms, totals


def margin_loss(problem: Problem, impl: str) -> Result:
    """Any EDF, through the margin operator of `impl` ("cpu" or "triton") and O(N) torch."""
    logits, target, ignore_index = problem.logits, problem.target, problem.ignore_index
    transform = problem.transform
    backward = needs_gradient(logits)
    keep = impl == "cpu" and _in_forward(problem)
    if keep and problem.inplace:
        direction = logits.detach()
        margin, lead = _operators.cpu_direction_(direction, target, ignore_index, transform)
    elif keep:
        margin, lead, direction = _operators.cpu_direction(logits.detach(), target, ignore_index, transform)
    elif problem.inplace:
        margin, statistics = _operators.margin(logits.detach(), target, ignore_index, impl, transform)
        lead = statistics[2]
    else:
        margin, statistics = _operators.margin(logits, target, ignore_index, impl, transform)
        lead = statistics[2]
    loss, terms, totals = of_margins(problem, margin)
    coefficient = coefficients(terms, totals)
    if keep:
        loss = _operators.attach_direction(logits, loss, direction, coefficient)
    elif problem.inplace:
        loss = _operators.attach_overwriting(logits, loss, target, statistics, coefficient, ignore_index, impl, transform)
    elif backward:
        loss = _operators.attach_to_margin(margin, loss, -coefficient)
    if not problem.return_output:
        return Result(loss)
    return Result(loss, received(problem, margin.detach(), lead, terms.log_weight, terms.sign, totals))


def triton_loss(problem: Problem) -> Result:
    """An EDF with a fused form, by the Triton kernels."""
    logits, target, ignore_index = problem.logits, problem.target, problem.ignore_index
    family, params, transform = problem.emphasis.family, problem.emphasis.params, problem.transform
    backward = needs_gradient(logits)
    weight = row_weights(problem)
    normalizer = _normalizer(problem, weight)
    known = problem.reduction == "mean" or problem.normalizer is not None
    in_forward = known and _in_forward(problem)
    # The gradient is attached to the value afterwards; otherwise the operator brings its own.
    attach = backward and not in_forward and (problem.inplace or problem.reduction == "none")
    if in_forward and problem.inplace:
        dlogits = logits.detach()
        loss, rows, totals = _operators.triton_fused_(
            dlogits, target, weight, params, normalizer, family, ignore_index, transform
        )
        loss = _operators.attach_overwritten(logits, loss, dlogits)
    elif in_forward:
        loss, rows, totals, dlogits = _operators.triton_fused(
            logits.detach(), target, weight, params, normalizer, family, ignore_index, transform
        )
        loss = _operators.attach_gradient(logits, loss, dlogits, target, rows, totals, ignore_index, transform)
    else:
        given = logits.detach() if attach else logits
        loss, rows, totals = _operators.triton_loss(given, target, weight, params, normalizer, family, ignore_index, transform)
    rows, totals = rows.detach(), totals.detach()
    _, row_sum, lead, log_weight, unit, sign, value = rows.unbind()
    if problem.reduction == "none":
        loss = row_values(RowTerms(log_weight, sign, unit, value), 0.0, problem.emphasis.loss is not None)
    if attach:
        loss = _operators.attach_rows(logits, loss, target, rows, totals, ignore_index, problem.inplace, transform)
    if not problem.return_output:
        return Result(loss)
    return Result(loss, received(problem, lead - row_sum.log(), lead, log_weight, sign, Totals(*totals.unbind())))
