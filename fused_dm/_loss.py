"""The two ways to the loss of logits (N, V): through the margins in torch, and fused in Triton kernels."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu, _operators, _validation
from ._operator import is_eager, is_plain
from ._rows import (
    LOG_FLOOR,
    RowTerms,
    Totals,
    batch_totals,
    coefficients,
    compute_dtype,
    example_weights,
    largest_log_weight,
    mean_divisor,
    quotient,
    rescaled_values,
    rounded_in_range,
    row_terms,
    row_values,
    row_weight,
)
from .edf._forms import CATALOGUE

# Logits whose gradient may be written in the forward pass and is then used up by the backward. fp16 has not the range for a
# gradient before its scale is known; fp64 is for checking, which runs a backward more than once.
IN_FORWARD = (torch.float32, torch.bfloat16)


# exp of it, and of it less, is finite in fp32.
FINITE_EXP = 80.0
# Divided by such a number, a weight that is below the range of fp32 is still below it, and one in the range is finite.
PLAIN_DIVISOR = (1.0, 1e30)
# 0 divided by such a number is 0, in fp32 too: the factor of a part is at most the reciprocal.
ORDINARY = (1e-30, 1e300)


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
    given = (problem.logits, problem.target, problem.weight, problem.sample_weight, problem.normalizer, problem.transform)
    shares = any(tensor is not None and _validation.is_batched(tensor) for tensor in (*given, problem.emphasis.params))
    return needs_gradient(problem.logits) and problem.logits.dtype in IN_FORWARD and not (overwrites_twice or shares)


def _valid(problem: Problem) -> Tensor:
    return problem.target != problem.ignore_index


def row_weights(problem: Problem, all_valid: bool = False) -> Tensor | None:
    """c of each row, (N,); None where every row has 1. `all_valid` tells that no row is ignored, and no label is no class."""
    if problem.weight is None and problem.sample_weight is None:
        return None
    dtype = compute_dtype(problem.logits.dtype)
    valid = None if all_valid else _valid(problem)
    return row_weight(problem.weight, problem.sample_weight, problem.target, valid, dtype)


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


def _eager_on_a_cpu(problem: Problem, margin: Tensor) -> bool:
    """Whether the rows may be shared by threads, and looked at."""
    # A function of the user's is called once, by the thread that called us. A mode that looks at every torch call, such as a
    # tracer's, does not see those of other threads.
    return margin.device.type == "cpu" and problem.emphasis.family is not None and is_eager() and is_plain(margin)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _folded(parts: list[Tensor], fold: Callable[[Tensor], Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else fold(torch.stack(parts))


def _is_ordinary(divisor: Tensor) -> bool:
    """Whether it is seen to be finite and not 0, which on a GPU would stop the host."""
    return divisor.device.type == "cpu" and is_eager() and is_plain(divisor) and _cpu.is_between(divisor, *ORDINARY)


class Weights(NamedTuple):
    """log |c w| and the sign of c of each row, (N,)."""

    log_weight: Tensor
    sign: Tensor


class OfMargins(NamedTuple):
    """What follows from the margins of all rows: the loss, the divisor, and numbers of the rows, in parts."""

    loss: Tensor  # () or (N,)
    totals: Callable[[], Totals]
    weights_of_parts: list[Weights]  # unless they were not to be kept
    undivided: list[Tensor]  # the coefficients, times the divisor and relative to a weight of the part's own; fp64 out of range
    factors: list[Tensor] | None  # by part what to multiply them by; None where the divisor alone is missing
    divisor: float | None = None  # as a number, where it is known as one and is an ordinary one


def weights_of(found: OfMargins) -> Weights:
    return Weights(*(_joined(list(parts)) for parts in zip(*found.weights_of_parts, strict=True)))


@torch.no_grad()
def coefficients_of(found: OfMargins, dtype: torch.dtype) -> Tensor:
    """k of each row, (N,) in `dtype`: the gradient is k exp(z_j - lse) for the other classes and -k for the label.

    A row that does not count, and one whose weight is 0, has 0 whatever the divisor is.
    """
    if found.divisor is not None:
        return _joined(found.undivided) / found.divisor
    if found.factors is None:
        undivided, divisor = _joined(found.undivided), found.totals().divisor
        if undivided.dtype == dtype:
            coefficient = undivided / divisor.to(dtype)
        else:
            coefficient = (undivided / rounded_in_range(divisor, dtype)).to(dtype)
        return coefficient if _is_ordinary(divisor) else coefficient.masked_fill_(undivided == 0, 0.0)
    ordinary = _is_ordinary(found.totals().divisor)
    sizes = [len(part) for part in found.undivided]
    coefficient = found.undivided[0].new_empty(sum(sizes))
    for part, factor, out in zip(found.undivided, found.factors, coefficient.split(sizes), strict=True):
        torch.mul(part, factor, out=out)
        if not ordinary:
            out.masked_fill_(part == 0, 0.0)
    return coefficient


class _Part(NamedTuple):
    """Numbers of some of the rows."""

    kept: Weights | None
    top: Tensor
    weights: Tensor  # their sum relative to exp(top), fp64
    values: Tensor  # their sum, fp64, or for reduction "none" one a row; relative to exp(top) for want of a normalizer and loss
    coefficients: Tensor  # k times the divisor, relative to exp(top) for want of a normalizer


@torch.no_grad()
def of_margins(problem: Problem, margin: Tensor, keep_weights: bool = True) -> OfMargins:
    """The loss, the rows' numbers and the batch's divisor from the margins (N,), in torch; without a gradient."""
    emphasis, margin = problem.emphasis, margin.detach()
    eager = _eager_on_a_cpu(problem, margin)
    # The margin of an ignored row is nan, and a label that is no class has been refused.
    moderate = eager and _cpu.are_moderate(margin)
    weight = row_weights(problem, all_valid=moderate)
    normalizer = _normalizer(problem, weight)
    # A function of the user's may change what it is given, which is used again there.
    if eager and emphasis.family in CATALOGUE:
        found = _of_ordinary_margins(problem, margin, moderate, weight, normalizer, keep_weights)
        if found:
            return found
    of = _any_part(problem, margin, weight, normalizer, keep_weights, eager)
    parts = _cpu.each(of, _cpu.pieces(margin.numel()) if eager else [slice(None)])
    by_row, has_loss = problem.reduction == "none", emphasis.loss is not None
    undivided, values = [part.coefficients for part in parts], [part.values for part in parts]
    kept = [part.kept for part in parts if part.kept is not None]
    if len(parts) == 1:
        totals = batch_totals(parts[0].top, parts[0].weights, normalizer)
        factors = None
    else:
        # What numbers relative to the largest weight of their part are to be multiplied by to be relative to that of all.
        top = torch.stack([part.top for part in parts]).amax()
        shares = [torch.where(part.top == top, 1.0, torch.exp(part.top.double() - top.double())) for part in parts]
        weights = [torch.where(share == 0, 0.0, part.weights * share) for part, share in zip(parts, shares, strict=True)]
        totals = batch_totals(top, torch.stack(weights).sum(), normalizer)
        factors = [(share / totals.divisor).to(margin.dtype) for share in shares] if normalizer is None else None
        if normalizer is None and not has_loss:
            values = [rescaled_values(part.values, share) for part, share in zip(parts, shares, strict=True)]
    if by_row:
        return OfMargins(_joined(values), lambda: totals, kept, undivided, factors)
    total = _folded(values, torch.sum)
    if has_loss:
        total = total * torch.exp(-totals.log_scale.double())
    return OfMargins(quotient(total, totals.divisor).to(margin.dtype), lambda: totals, kept, undivided, factors)


def _of_ordinary_margins(
    problem: Problem,
    margin: Tensor,
    moderate: bool,
    weight: Tensor | None,
    normalizer: Tensor | None,
    keep_weights: bool,
) -> OfMargins | None:
    """`of_margins` where the rows that count have finite numbers, else None. Seen to be so, it spares most of the passes.

    What the batch has one of is a Python number, as a torch call takes longer than its computation.
    """
    emphasis, has_loss, relative = problem.emphasis, problem.emphasis.loss is not None, normalizer is None
    if problem.reduction == "none" or not len(margin):
        return None
    if normalizer is not None and not _cpu.is_between(normalizer, *PLAIN_DIVISOR):
        return None
    counted = _cpu.counted(margin, moderate, weight, problem.target, problem.ignore_index)
    if counted is None:
        return None
    eps, *params = _cpu.numbers(emphasis.params)
    log_p, log_q = _cpu.logarithms(counted.margin)

    def of(rows: slice) -> tuple[Tensor, Tensor, float]:
        p, q = log_p[rows], log_q[rows]
        log_weights = emphasis.log_weight(p, q, *params)
        # An EDF of the catalogue returns a tensor of its own, and memory counts where there are more rows than classes.
        values = p.neg_() if emphasis.loss is None else emphasis.loss(p, q, *params)
        if counted.log_size is not None:
            log_weights = log_weights + counted.log_size[rows]
        return log_weights, values, _cpu.number(log_weights.amax())

    log_weights, values_of_parts, tops = map(list, zip(*_cpu.each(of, _cpu.pieces(len(margin))), strict=True))
    # Not so for nan.
    if not all(top < (math.inf if relative else FINITE_EXP) for top in tops):
        return None
    top = max(_cpu.rounded(LOG_FLOOR, margin.dtype), *tops)
    log_w, value = _joined(log_weights), _joined(values_of_parts) if has_loss else log_p
    del log_weights, values_of_parts
    row_weight = counted.sign if weight is None else weight
    options = (_cpu.rounded(eps, margin.dtype), top, not relative, has_loss)
    weights, total, coefficient = _cpu.weigh(log_w, log_q, value, counted.sign, row_weight, *options)
    weights += math.exp(LOG_FLOOR - top)
    divisor = weights if normalizer is None else _cpu.number(normalizer)
    # An infinite value of the row whose margin the others have been given is nan times 0.
    if not (math.isfinite(total) and ORDINARY[0] <= abs(divisor) <= ORDINARY[1]):
        return None
    if relative and has_loss:
        total *= math.exp(-top)
    numbers = (top if relative else 0.0, divisor, weights * _cpu.exp(top))
    kept = []
    if keep_weights:
        kept = [Weights(log_w, margin.new_ones(()).expand_as(margin) if counted.sign is None else counted.sign)]
    return OfMargins(
        margin.new_tensor(total / divisor),
        lambda: Totals(*margin.new_tensor(numbers, dtype=torch.float64).unbind()),
        kept,
        [coefficient],
        None,
        divisor,
    )


def _any_part(
    problem: Problem, margin: Tensor, weight: Tensor | None, normalizer: Tensor | None, keep_weights: bool, eager: bool
) -> Callable[[slice], _Part]:
    """What takes some of the rows, whatever their numbers are."""
    emphasis = problem.emphasis
    eps, *params = emphasis.params.unbind()
    eps = eps.to(margin.dtype)
    log_weight = _with(emphasis.log_weight, params)
    loss = None if emphasis.loss is None else _with(emphasis.loss, params)
    plain = normalizer is None or (eager and _cpu.is_between(normalizer, *PLAIN_DIVISOR))

    def of(rows: slice) -> _Part:
        valid = problem.target[rows] != problem.ignore_index
        terms = row_terms(margin[rows], valid, None if weight is None else weight[rows], eps, log_weight, loss)
        top = largest_log_weight(terms.log_weight)
        relative = torch.exp(terms.log_weight - top)
        weights = (terms.sign * relative).sum(dtype=torch.float64)
        wide = normalizer is not None and not (plain and _cpu.is_below(top, FINITE_EXP))
        if normalizer is not None:
            relative = torch.exp(terms.log_weight)
        if wide:
            in_range = terms.log_weight.abs() < FINITE_EXP
            relative = torch.where(in_range, relative.double(), torch.exp(terms.log_weight.double()))
        values, coefficient = row_values(terms, relative, loss is not None), coefficients(terms, relative)
        if wide:
            values, coefficient = rounded_in_range(values, margin.dtype), rounded_in_range(coefficient, margin.dtype)
        values = values.to(margin.dtype) if problem.reduction == "none" else values.sum(dtype=torch.float64)
        kept = Weights(terms.log_weight, terms.sign) if keep_weights else None
        return _Part(kept, top, weights, values, coefficient)

    return of


def margin_loss(problem: Problem, impl: str) -> Result:
    """Any EDF, through the margin operator of `impl` ("cpu" or "triton") and O(N) torch."""
    logits, target, ignore_index = problem.logits, problem.target, problem.ignore_index
    transform = problem.transform
    backward = needs_gradient(logits)
    # A function of the user's may raise, and the logits are then to be as they were.
    keep = impl == "cpu" and _in_forward(problem) and not (problem.inplace and problem.emphasis.family is None)
    if keep and problem.inplace:
        logits = _operators.take(logits)
        direction = logits.detach()
        margin, lead, norm = _operators.cpu_direction_(direction, target, ignore_index, problem.return_output, transform)
    elif keep:
        given = (logits.detach(), target, ignore_index, problem.return_output, transform)
        margin, lead, norm, direction = _operators.cpu_direction(*given)
    elif problem.inplace:
        margin, statistics = _operators.margin(logits.detach(), target, ignore_index, impl, transform)
        lead = statistics[2]
    else:
        margin, statistics = _operators.margin(logits, target, ignore_index, impl, transform)
        lead = statistics[2]
    if not problem.return_output:
        del lead
    found = of_margins(problem, margin, keep_weights=problem.return_output)
    loss, coefficient = found.loss, coefficients_of(found, margin.dtype)
    if keep:
        loss = _operators.attach_direction(logits, loss, direction, coefficient, norm, transform is None)
    elif problem.inplace:
        taken = _operators.take(logits)
        loss = _operators.attach_overwriting(taken, loss, target, statistics, coefficient, ignore_index, impl, transform)
    elif backward:
        loss = _operators.attach_to_margin(margin, loss, -coefficient)
    if not problem.return_output:
        return Result(loss)
    return Result(loss, received(problem, margin.detach(), lead, *weights_of(found), found.totals()))


def triton_loss(problem: Problem) -> Result:
    """An EDF with a fused form, by the Triton kernels."""
    logits = _operators.take(problem.logits) if problem.inplace else problem.logits
    target, ignore_index = problem.target, problem.ignore_index
    family, params, transform = problem.emphasis.family, problem.emphasis.params, problem.transform
    backward = needs_gradient(problem.logits)
    weights = (problem.weight, problem.sample_weight)
    if problem.reduction == "mean":
        dtype = compute_dtype(logits.dtype)
        normalizer = _operators.triton_divisor(target, *weights, logits.shape[1], ignore_index, dtype)
    else:
        normalizer = _normalizer(problem, None)
    known = problem.reduction == "mean" or problem.normalizer is not None
    in_forward = known and _in_forward(problem)
    # The gradient is attached to the value afterwards; otherwise the operator brings its own.
    attach = backward and not in_forward and (problem.inplace or problem.reduction == "none")
    if in_forward and problem.inplace:
        dlogits = logits.detach()
        loss, rows, totals = _operators.triton_fused_(
            dlogits, target, *weights, params, normalizer, family, ignore_index, transform
        )
        loss = _operators.attach_overwritten(logits, loss, dlogits)
    elif in_forward:
        loss, rows, totals, dlogits = _operators.triton_fused(
            logits.detach(), target, *weights, params, normalizer, family, ignore_index, transform
        )
        loss = _operators.attach_gradient(logits, loss, dlogits, target, rows, totals, ignore_index, transform)
    else:
        given = logits.detach() if attach else logits
        loss, rows, totals = _operators.triton_loss(
            given, target, *weights, params, normalizer, family, ignore_index, transform
        )
    rows, totals = rows.detach(), totals.detach()
    if problem.reduction == "none":
        _, _, _, log_weight, unit, sign, value = rows.unbind()
        loss = row_values(RowTerms(log_weight, sign, unit, value), log_weight.exp(), problem.emphasis.loss is not None)
    if attach:
        loss = _operators.attach_rows(logits, loss, target, rows, totals, ignore_index, problem.inplace, transform)
    if not problem.return_output:
        return Result(loss)
    return Result(loss, Received(*_operators.triton_received(target, rows, totals, ignore_index)))
