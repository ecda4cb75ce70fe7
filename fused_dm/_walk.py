"""What the CPU implementation does with one block of logits after another, in the subset of Python that TorchScript compiles.

Compiled, a call goes through many blocks without Python's lock, so that no thread waits for another between two torch calls.
The torch calls are the same in either form, and so are the bits of what they give.

Matrices are (B, V, P) and row b P + p of the batch is [b, :, p]; what a row has one of is (B, 1, P). A block is `height` whole
planes, or `width` positions of a single one.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def block_of(tensor: Tensor, plane: int, planes: int, position: int, positions: int) -> Tensor:
    """A block, as a view."""
    block = tensor.narrow(0, plane, planes)
    # The call costs as much as a pass over a thousand numbers.
    return block if block.size(2) == positions else block.narrow(2, position, positions)


def room_for(scratch: Tensor, planes: int, positions: int) -> Tensor:
    """The part of the scratch memory that holds a block, which the last ones do not fill."""
    return block_of(scratch, 0, planes, 0, positions)


def transform_(logits: Tensor, transform: Tensor, slope: Tensor | None) -> None:
    """Replace logits by scale z or cap tanh(scale z / cap), and fill `slope` with the derivative.

    That is scale / cosh^2, which has its digits where 1 - tanh^2 has lost them.
    """
    logits.mul_(transform[0])
    if transform.shape[0] == 2:
        logits.div_(transform[1])
        if slope is not None:
            torch.cosh(logits, out=slope).reciprocal_().square_().mul_(transform[0])
        logits.tanh_().mul_(transform[1])
    elif slope is not None:
        slope.copy_(transform[0])


def plain_(block: Tensor, label: Tensor, row_sum: Tensor, least_sum: float, largest_sum: float) -> bool:
    """Turn a block of logits into exp(z), and note the rows' sums without the label. Whether all sums are within the limits."""
    # Of the label, exp(-80) is nothing beside such sums, and larger numbers would take digits from them. Torch's exp is ten
    # times slower where it meets -inf; and a scatter of as many numbers is faster than one of a number, if there are many.
    block.scatter_(1, label, row_sum.fill_(-80.0))
    torch.sum(block.exp_(), 1, keepdim=True, out=row_sum)
    least, most = torch.aminmax(row_sum)
    # Not so for nan.
    return float(least) >= least_sum and float(most) <= largest_sum


def shifted_(block: Tensor, label: Tensor, row_shift: Tensor, row_sum: Tensor, lowest: float) -> None:
    """Turn a block of logits into exp(z - max), for maxima `row_shift` without the label, and note sums without it."""
    # -inf less the lowest number is still -inf, where -inf less -inf is nan.
    row_shift.clamp_(min=lowest)
    # The label's entry becomes exp(0) = 1 and is taken off again.
    block.scatter_(1, label, row_shift)
    block.sub_(row_shift)
    # 1 or more; or 0 where no other class has a finite logit, and then so is the row.
    torch.sum(block.exp_(), 1, keepdim=True, out=row_sum).sub_(1)


def read_again_(block: Tensor, given: Tensor, overwrites: bool, transform: Tensor | None) -> None:
    """Make a block what it was. Logits that it `overwrites` have been kept as they were after the transform."""
    block.copy_(given)
    if transform is not None and not overwrites:
        transform_(block, transform, None)


def promises(row: Tensor, least_sum: float, largest_sum: float) -> bool:
    """Whether exponentials of a row of logits (V,) have a sum within the limits, or nearly."""
    most = float(row.amax())
    # Torch's exp is ten times slower where its result leaves the range.
    if not (most >= math.log(least_sum / row.size(0)) and most <= math.log(largest_sum)):
        return False
    return most >= math.log(least_sum) or float(row.exp().sum()) >= least_sum


def fill_(
    block: Tensor,
    given: Tensor,
    transform: Tensor | None,
    label: Tensor,
    label_logit: Tensor,
    row_shift: Tensor,
    row_sum: Tensor,
    lead: Tensor | None,
    lowest: float,
    least_sum: float,
    largest_sum: float,
    trial: Tensor | None,
    overwrites: bool,
    first: bool,
) -> None:
    """Turn a block of logits into exp(z - m) over all classes but the label, and note m, the sums, and leads z_y - max.

    m is the maximum, or where all sums of exp(z) are within the limits 0, which spares one pass or two. Which of the two it is
    depends on the block alone, unless `trial` is None: then it is the maximum. Which is computed first does not: `trial`, which
    all blocks share, is True until a block has failed, or a row of a `first` one looks as if it would. After that, and where
    leads are wanted, maxima tell mostly. A block that went the wrong way is had again from what is `given`, or where it
    `overwrites` the logits kept there.

    The labels' entries are left to the caller. `lowest` is the lowest finite number.
    """
    torch.gather(block, 1, label, out=label_logit)
    tries, unsure, has_max = trial is not None, False, lead is not None
    if trial is not None and not has_max:
        has_max = not bool(trial)
        if first and not has_max:
            block.scatter_(1, label, row_sum.fill_(-80.0))
            has_max = not promises(block[0, :, 0], least_sum, largest_sum)
            if has_max:
                trial.fill_(False)
    if has_max:
        block.scatter_(1, label, row_shift.fill_(-math.inf))
        torch.amax(block, 1, keepdim=True, out=row_shift)
        if lead is not None:
            torch.sub(label_logit, row_shift, out=lead)
        least, most = torch.aminmax(row_shift)
        # Not so for nan.
        tries = tries and float(least) >= math.log(least_sum / block.size(1)) - 0.01
        tries = tries and float(most) <= math.log(largest_sum) + 0.01
        unsure = tries and float(least) < math.log(least_sum)
    if tries and overwrites:
        given.copy_(block)
    if unsure:
        shifted_(block, label, row_shift, row_sum, lowest)
        if float(row_shift.exp().mul_(row_sum).amin()) < 0.99 * least_sum:
            return
        read_again_(block, given, overwrites, transform)
    if tries:
        if plain_(block, label, row_sum, least_sum, largest_sum):
            row_shift.zero_()
            return
        if trial is not None:
            trial.fill_(False)
        read_again_(block, given, overwrites, transform)
    if not has_max:
        block.scatter_(1, label, row_shift.fill_(-math.inf))
        torch.amax(block, 1, keepdim=True, out=row_shift)
    shifted_(block, label, row_shift, row_sum, lowest)


def margins(label_logit: Tensor, row_shift: Tensor, row_sum: Tensor, margin: Tensor, step: int, begin: int, end: int) -> None:
    """Fill margins z_y - m - log sum exp(z_j - m), (N,) as what they are made of, in steps `begin` to `end` of `step` rows."""
    for number in range(begin, end):
        first = number * step
        count = min(step, margin.size(0) - first)
        margins = margin.narrow(0, first, count)
        # -log(sum exp(z_j - m) exp(m - z_y)), as a difference of logarithms loses digits; the fewer, the further off z_y is.
        lead = label_logit.narrow(0, first, count) - row_shift.narrow(0, first, count)
        by = lead.clamp(-40.0, 40.0)
        torch.sub(lead, by, out=margins)
        margins.sub_(by.neg_().exp_().mul_(row_sum.narrow(0, first, count)).log_())


def walk(
    logits: Tensor,
    label: Tensor,
    label_logit: Tensor,
    row_shift: Tensor,
    row_sum: Tensor,
    lead: Tensor | None,
    out: Tensor | None,
    scratch: Tensor | None,
    factor: Tensor | None,
    undivided: bool,
    transform: Tensor | None,
    lowest: float,
    least_sum: float,
    largest_sum: float,
    trial: Tensor | None,
    overwrites: bool,
    height: int,
    width: int,
    begin: int,
    end: int,
) -> None:
    """Note the statistics of the rows of blocks `begin` to `end`, and fill `out` with their gradient times -`factor`.

    That is exp(z_j - lse), and -1 for the label, times the slope of the transform; a `factor` of None is -1, or where it is
    `undivided` minus the sum of the row, which spares a pass. Without `out` there are the statistics alone. Without `scratch`,
    which holds a block in the dtype of the statistics, the computation takes place in `out`; and with it too where that
    `overwrites` the logits. For statistics, limits and `trial` see `fill_`.
    """
    minus_one = row_shift.new_full([1, 1, 1], -1.0)
    across = (logits.size(2) + width - 1) // width
    for number in range(begin, end):
        plane, position = number // across * height, number % across * width
        planes, positions = min(height, logits.size(0) - plane), min(width, logits.size(2) - position)
        given = block_of(logits, plane, planes, position, positions)
        result = given if out is None else block_of(out, plane, planes, position, positions)
        room = result if scratch is None else room_for(scratch, planes, positions)
        block = result if overwrites else room
        block.copy_(given)
        slope: Tensor | None = None
        if transform is not None:
            if out is not None:
                slope = torch.empty_like(block)
            transform_(block, transform, slope)
        at = block_of(label, plane, planes, position, positions)
        total = block_of(row_sum, plane, planes, position, positions)
        leads: Tensor | None = None
        if lead is not None:
            leads = block_of(lead, plane, planes, position, positions)
        fill_(
            block,
            room if overwrites else given,
            transform,
            at,
            block_of(label_logit, plane, planes, position, positions),
            block_of(row_shift, plane, planes, position, positions),
            total,
            leads,
            lowest,
            least_sum,
            largest_sum,
            trial,
            overwrites,
            number == begin,
        )
        if out is not None:
            if factor is not None:
                # Where the sum of a row is 0, so is the block, and the caller fills the label's entry with 0.
                factors = block_of(factor, plane, planes, position, positions)
                block.mul_(torch.div(factors, total.clamp(min=0.5)).neg_()).scatter_(1, at, factors)
            elif undivided:
                block.scatter_(1, at, -total)
            else:
                block.mul_(total.clamp(min=0.5).reciprocal_()).scatter_(1, at, minus_one.expand_as(at))
            if slope is not None:
                block.mul_(slope)
            if scratch is not None and not overwrites:
                result.copy_(block)


def scale(matrix: Tensor, factor: Tensor, scratch: Tensor | None, height: int, width: int, begin: int, end: int) -> None:
    """Multiply the rows of blocks `begin` to `end` by their factors, in the dtype of `scratch`, rounding once."""
    across = (matrix.size(2) + width - 1) // width
    for number in range(begin, end):
        plane, position = number // across * height, number % across * width
        planes, positions = min(height, matrix.size(0) - plane), min(width, matrix.size(2) - position)
        block = block_of(matrix, plane, planes, position, positions)
        factors = block_of(factor, plane, planes, position, positions)
        if scratch is None:
            block.mul_(factors)
        else:
            block.copy_(room_for(scratch, planes, positions).copy_(block).mul_(factors))


def scale_16_bits(
    rows: Tensor, bits: Tensor | None, peak: Tensor | None, factor: Tensor, height: int, begin: int, end: int
) -> None:
    """Multiply blocks `begin` to `end` of contiguous rows (N, V) by their factors (N,), which are finite and fp32.

    The numbers go through fp32 within a call, not through scratch memory: of torch's calls batch norm takes 16-bit numbers and
    fp32 factors. Its mean is 0 here, its variance 1 and its bias 0. `bits`, unless None, are the rows as int16: a look at a
    block's largest brings it into the cache, three times as fast as a call with more to do for each number.
    """
    zero, one, nothing = factor.new_zeros([height]), factor.new_ones([height]), factor.new_empty([0])
    for number in range(begin, end):
        first = number * height
        count = min(height, rows.size(0) - first)
        if bits is not None and peak is not None:
            torch.amax(bits.narrow(0, first, count), [0, 1], out=peak)
        block, factors = rows.narrow(0, first, count).unsqueeze(0), factor.narrow(0, first, count)
        mean, variance = zero.narrow(0, 0, count), one.narrow(0, 0, count)
        torch.ops.aten.native_batch_norm(
            block, factors, mean, mean, variance, False, 0.0, 0.0, out=block, save_mean=nothing, save_invstd=nothing
        )
        # Torch 2.11 looks at the block once more when the call no longer holds it: a use keeps it until then.
        assert block.size(1) == count


def scale_planes_16_bits(matrix: Tensor, factor: Tensor, begin: int, end: int) -> None:
    """The same for planes of a contiguous (B, V, P), whose positions are the channels here and whose classes the batch."""
    positions = matrix.size(2)
    zero, one, nothing = factor.new_zeros([positions]), factor.new_ones([positions]), factor.new_empty([0])
    for number in range(begin, end):
        plane, factors = matrix[number], factor.narrow(0, number * positions, positions)
        torch.ops.aten.native_batch_norm(
            plane, factors, zero, zero, one, False, 0.0, 0.0, out=plane, save_mean=nothing, save_invstd=nothing
        )
        assert plane.size(1) == positions  # As above.


def logarithms(margin: Tensor, log_p: Tensor, log_q: Tensor, step: int, begin: int, end: int) -> None:
    """Fill log p and log q from margins (N,) that are not nan, in steps `begin` to `end` of `step` rows."""
    for number in range(begin, end):
        first = number * step
        count = min(step, margin.size(0) - first)
        margins, p, q = margin.narrow(0, first, count), log_p.narrow(0, first, count), log_q.narrow(0, first, count)
        # The larger of the two; the other is further off by the margin.
        torch.abs(margins, out=q).neg_().exp_().log1p_().neg_()
        torch.clamp(margins, max=0.0, out=p).add_(q)
        q.sub_(margins.clamp(min=0.0))


def weigh(
    log_weight: Tensor,
    log_q: Tensor,
    value: Tensor,
    sign: Tensor | None,
    row_weight: Tensor | None,
    eps: float,
    top: float,
    absolute: bool,
    has_loss: bool,
    coefficient: Tensor,
    sums: Tensor,
    step: int,
    begin: int,
    end: int,
) -> None:
    """Fill `coefficient` (N,) and `sums` (2, steps), fp64, of weights and values, for rows whose numbers are finite.

    The weights are relative to exp(`top`), and so are values and coefficients unless `absolute`. The values are f(p) times
    `row_weight` where the EDF `has_loss`, else the weight times `value`. A `sign` and a `row_weight` of None are 1.
    """
    for number in range(begin, end):
        first = number * step
        count = min(step, log_weight.size(0) - first)
        log_w, values = log_weight.narrow(0, first, count), value.narrow(0, first, count)
        total = sums.narrow(1, number, 1)
        signs: Tensor | None = None
        if sign is not None:
            signs = sign.narrow(0, first, count)
        weight = torch.sub(log_w, top, out=coefficient.narrow(0, first, count)).exp_()
        if signs is not None:
            weight.mul_(signs)
        torch.sum(weight, [0], keepdim=True, dtype=torch.float64, out=total[0])
        if absolute:
            torch.exp(log_w, out=weight)
            if signs is not None:
                weight.mul_(signs)
        if not has_loss:
            values = weight * values
        elif row_weight is not None:
            values = row_weight.narrow(0, first, count) * values
        torch.sum(values, [0], keepdim=True, dtype=torch.float64, out=total[1])
        if eps == 0.0:
            weight.mul_(0.5)
        else:
            q = log_q.narrow(0, first, count).exp()
            weight.mul_(torch.div(q, q.mul(2.0).add_(eps)))


class Walks(NamedTuple):
    """The walks, and in words by what they are run."""

    walk: Callable[..., None]
    margins: Callable[..., None]
    scale: Callable[..., None]
    scale_16_bits: Callable[..., None]
    scale_planes_16_bits: Callable[..., None]
    logarithms: Callable[..., None]
    weigh: Callable[..., None]
    run_by: str


PLAIN = Walks(walk, margins, scale, scale_16_bits, scale_planes_16_bits, logarithms, weigh, "Python")


@cache
def walks() -> Walks:
    """The walks compiled; or as they stand, where their source is not at hand or this torch does not compile it."""
    parts = (block_of, room_for, transform_, plain_, shifted_, read_again_, promises, fill_, *PLAIN[:-1])
    try:
        unit = torch.jit.CompilationUnit("\n\n".join(inspect.getsource(part) for part in parts))
        return Walks(*(getattr(unit, name) for name in Walks._fields[:-1]), run_by="TorchScript")  # type: ignore[misc]
    except (OSError, AttributeError, RuntimeError) as error:
        reason = f"Python, slower with several threads, because of {type(error).__name__}: {error}"
        return PLAIN._replace(run_by=reason)
