"""The CPU implementation: blocks of whole rows, one label-masked softmax a block."""

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

from ._rows import compute_dtype

# Elements a block holds. Every torch operation is a parallel region, so blocks must not be small; a block that fits the
# last-level cache is read again at no cost.
BLOCK_ELEMENTS = 1 << 20
# torch's softmax adds up a row's exponentials lane by lane; over 2^16 classes that is off by 2e-6, over 10^7 by 5e-4. Longer
# rows are divided by their sum once more, which torch adds in cascades.
LONG_ROW = 1 << 15


def _blocks(rows: int, classes: int) -> list[slice]:
    height = max(1, BLOCK_ELEMENTS // max(1, classes), min(rows, torch.get_num_threads()))
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def _new_gradient(logits: Tensor) -> Tensor:
    """An empty (N, V) tensor of the logits' dtype, on huge pages where Linux gives them on request.

    A gradient is new memory in every step, and the faults on its pages of 4 KiB cost as much as the computation. The request
    is a hint, as numpy makes it for its own arrays: where it is not granted, nothing else changes.
    """
    out = logits.new_empty(logits.shape)
    size = out.numel() * out.element_size()
    if sys.platform == "linux" and size >= 1 << 22:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (out.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out


def check_labels(target: Tensor, valid: Tensor, classes: int, ignore_index: int) -> None:
    wrong = valid & ((target < 0) | (target >= classes))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise IndexError(
            f"target: expected labels in [0, {classes}) or ignore_index={ignore_index}, got {int(target[at])} at row {at}"
        )


class _Pass:
    """Labels and row statistics of one walk over the logits."""

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> None:
        rows, classes = logits.shape
        self.dtype = compute_dtype(logits.dtype)
        self.valid = target != ignore_index
        target = target.long()
        check_labels(target, self.valid, classes, ignore_index)
        self.label = torch.where(self.valid, target, 0)[:, None]
        self.row_max = logits.new_empty(rows, dtype=self.dtype)
        self.row_sum = logits.new_empty(rows, dtype=self.dtype)
        self.logits = logits
        # Before a block is overwritten.
        self.label_logit = logits.gather(1, self.label)[:, 0].to(self.dtype)
        self.transform = transform
        if transform is not None:
            _transform_(self.label_logit, transform)

    def block(self, rows: slice, out: Tensor, slope: Tensor | None = None) -> None:
        """Fill `out` with exp(z - lse) over the classes other than the label (0 there), and note the row statistics.

        `slope` is filled with the derivative of the logits that the loss takes by those that are given.
        """
        out.copy_(self.logits[rows])
        if self.transform is not None:
            _transform_(out, self.transform, slope)
        out.scatter_(1, self.label[rows], -math.inf)
        row_max = out.amax(1)
        torch.softmax(out, 1, out=out)
        if out.shape[1] > LONG_ROW:
            out.div_(out.sum(1, keepdim=True))
        self.row_max[rows] = row_max
        self.row_sum[rows] = torch.where(row_max == -math.inf, 0, out.amax(1).reciprocal())

    def margins(self) -> tuple[Tensor, Tensor]:
        """The rows' margin and z_y - max; nan for ignored rows and for a label at +inf."""
        label_logit = self.label_logit.masked_fill(~self.valid | (self.label_logit == math.inf), math.nan)
        lead = label_logit - torch.where(self.row_max == -math.inf, 0, self.row_max)
        return lead - self.row_sum.log(), lead


def _transform_(logits: Tensor, transform: Tensor, slope: Tensor | None = None) -> None:
    """Replace logits by scale z or cap tanh(scale z / cap), and fill `slope` with the derivative.

    That is scale / cosh^2, which has its digits where 1 - tanh^2 has lost them.
    """
    logits.mul_(transform[0])
    if len(transform) == 2:
        logits.div_(transform[1])
        if slope is not None:
            torch.cosh(logits, out=slope).reciprocal_().square_().mul_(transform[0])
        logits.tanh_().mul_(transform[1])
    elif slope is not None:
        slope.fill_(transform[0])


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    height = max((rows.stop - rows.start for rows in _blocks(*logits.shape)), default=0)
    return logits.new_empty((height, logits.shape[1]), dtype=dtype)


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N): max, sum, lead."""
    walk = _Pass(logits, target, ignore_index, transform)
    if logits.shape[1]:
        scratch = _scratch(logits, walk.dtype)
        for rows in _blocks(*logits.shape):
            walk.block(rows, scratch[: rows.stop - rows.start])
    margins, lead = walk.margins()
    return margins, torch.stack([walk.row_max, walk.row_sum, lead])


def direction(
    logits: Tensor, target: Tensor, ignore_index: int, out: Tensor | None = None, transform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Margins and leads (N,), and the gradient for k = 1, (N, V): exp(z_j - lse), and -1 for the label, times the slope.

    `out` may be the logits themselves.
    """
    walk = _Pass(logits, target, ignore_index, transform)
    out = _new_gradient(logits) if out is None else out
    scratch = None if out.dtype == walk.dtype else _scratch(logits, walk.dtype)
    slopes = None if transform is None else _scratch(logits, walk.dtype)
    for rows in _blocks(*logits.shape):
        block = out[rows] if scratch is None else scratch[: rows.stop - rows.start]
        slope = None if slopes is None else slopes[: rows.stop - rows.start]
        walk.block(rows, block, slope)
        block.scatter_(1, walk.label[rows], -1.0)
        if slope is not None:
            block.mul_(slope)
        if scratch is not None:
            out[rows] = block
    return *walk.margins(), out


def scale_rows_(matrix: Tensor, factor: Tensor) -> None:
    """Multiply each row of `matrix` (N, V) by its factor (N,), rounding once; a factor of 0 gives 0 whatever the row holds."""
    scratch = None if matrix.dtype == factor.dtype else _scratch(matrix, factor.dtype)
    # Backwards: the blocks written last may still be in the cache.
    for rows in reversed(_blocks(*matrix.shape)):
        if scratch is None:
            matrix[rows].mul_(factor[rows, None])
        else:
            matrix[rows] = scratch[: rows.stop - rows.start].copy_(matrix[rows]).mul_(factor[rows, None])
    zero = (factor == 0).nonzero()[:, 0]
    if zero.numel():
        matrix.index_fill_(0, zero, 0.0)


def margin_gradient(
    logits: Tensor,
    target: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    out: Tensor | None = None,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits (N, V) for a derivative by the margin (N,), from the logits. `out` may be the logits themselves."""
    walk = _Pass(logits, target, ignore_index, transform)
    out = _new_gradient(logits) if out is None else out
    scratch = _scratch(logits, walk.dtype)
    slopes = None if transform is None else _scratch(logits, walk.dtype)
    for rows in _blocks(*logits.shape):
        block = scratch[: rows.stop - rows.start]
        slope = None if slopes is None else slopes[: rows.stop - rows.start]
        walk.block(rows, block, slope)
        factor = torch.where(walk.row_sum[rows] == 0, 0, -dmargin[rows])
        block.mul_(factor[:, None]).scatter_(1, walk.label[rows], -factor[:, None])
        if slope is not None:
            block.mul_(slope)
        out[rows] = block
    zero = (~walk.valid | (dmargin == 0) | (walk.row_sum == 0)).nonzero()[:, 0]
    return out.index_fill_(0, zero, 0.0) if zero.numel() else out
