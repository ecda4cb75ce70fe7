"""What the CPU implementation does with one block of logits after another, in the subset of Python that TorchScript compiles.

Compiled, a call goes through many blocks without Python's lock, so that no thread waits for another between two torch calls.
The torch calls are the same in either form, and so are the bits of what they give.

Matrices are (B, V, P) and row b P + p of the batch is [b, :, p]; what a row has one of is (B, 1, P). A block is `height` whole
planes, or `width` positions of a single one.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def block_of(tensor: Tensor, number: int, height: int, width: int) -> Tensor:
    """A block, as a view: they are counted along the positions of a plane first."""
    across = (tensor.shape[2] + width - 1) // width
    planes = tensor.narrow(0, number // across * height, min(height, tensor.shape[0] - number // across * height))
    if across == 1:
        return planes
    position = number % across * width
    return planes.narrow(2, position, min(width, tensor.shape[2] - position))


def room_for(block: Tensor, scratch: Tensor) -> Tensor:
    """The part of the scratch memory that holds a block, which the last ones do not fill."""
    if block.shape == scratch.shape:
        return scratch
    return scratch[: block.shape[0], :, : block.shape[2]]


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


def fill_(block: Tensor, label: Tensor, label_logit: Tensor, row_max: Tensor, row_sum: Tensor, lowest: float) -> None:
    """Turn a block of logits into exp(z - lse) over all classes but the label, and note the rows' statistics.

    The labels' entries are left to the caller. `lowest` is the lowest finite number.
    """
    torch.gather(block, 1, label, out=label_logit)
    block.scatter_(1, label, torch.full_like(row_max, float("-inf")))
    torch.amax(block, 1, keepdim=True, out=row_max)
    # -inf less the lowest number is still -inf, where -inf less -inf is nan.
    row_max.clamp_(min=lowest)
    # The label's entry becomes exp(0) = 1 and is taken off again: torch's exp is ten times slower where it meets -inf.
    block.scatter_(1, label, row_max)
    block.sub_(row_max).exp_()
    torch.sum(block, 1, keepdim=True, out=row_sum).sub_(1)
    # 1 or more; or 0 where no other class has a finite logit, and then so is the row.
    block.mul_(row_sum.clamp(min=0.5).reciprocal_())


def walk(
    logits: Tensor,
    label: Tensor,
    label_logit: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    out: Tensor | None,
    scratch: Tensor | None,
    factor: Tensor | None,
    transform: Tensor | None,
    lowest: float,
    height: int,
    width: int,
    begin: int,
    end: int,
) -> None:
    """Note the statistics of the rows of blocks `begin` to `end`, and fill `out` with their gradient times -`factor`.

    That is exp(z_j - lse), and -1 for the label, times the slope of the transform; a `factor` of None is -1. Without `out`
    there are the statistics alone. Without `scratch`, which holds a block in the dtype of the statistics, the computation
    takes place in `out`.
    """
    for number in range(begin, end):
        given = block_of(logits, number, height, width)
        result = given if out is None else block_of(out, number, height, width)
        block = result if scratch is None else room_for(given, scratch)
        block.copy_(given)
        slope: Tensor | None = None
        if transform is not None:
            if out is not None:
                slope = torch.empty_like(block)
            transform_(block, transform, slope)
        at = block_of(label, number, height, width)
        maxima = block_of(row_max, number, height, width)
        fill_(
            block,
            at,
            block_of(label_logit, number, height, width),
            maxima,
            block_of(row_sum, number, height, width),
            lowest,
        )
        if out is not None:
            if factor is None:
                block.scatter_(1, at, torch.full_like(maxima, -1.0))
            else:
                # Where the sum of a row is 0, so is the block, and the caller fills the label's entry with 0.
                factors = block_of(factor, number, height, width)
                block.mul_(-factors).scatter_(1, at, factors)
            if slope is not None:
                block.mul_(slope)
            if scratch is not None:
                result.copy_(block)


def scale(matrix: Tensor, factor: Tensor, scratch: Tensor | None, height: int, width: int, begin: int, end: int) -> None:
    """Multiply the rows of blocks `begin` to `end` by their factors, in the dtype of `scratch`, rounding once."""
    for number in range(begin, end):
        block, factors = block_of(matrix, number, height, width), block_of(factor, number, height, width)
        if scratch is None:
            block.mul_(factors)
        else:
            block.copy_(room_for(block, scratch).copy_(block).mul_(factors))


class Walks(NamedTuple):
    """The two walks, and in words by what they are run."""

    walk: Callable[..., None]
    scale: Callable[..., None]
    run_by: str


@cache
def walks() -> Walks:
    """The walks compiled; or as they stand, where their source is not at hand or this torch does not compile it."""
    try:
        source = "\n\n".join(inspect.getsource(part) for part in (block_of, room_for, transform_, fill_, walk, scale))
        unit = torch.jit.CompilationUnit(source)
        return Walks(unit.walk, unit.scale, "TorchScript")
    except (OSError, AttributeError, RuntimeError) as error:
        return Walks(walk, scale, f"Python, slower with several threads, because of {type(error).__name__}: {error}")
