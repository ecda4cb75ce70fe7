"""The CPU implementation: blocks of whole rows, exponentiated once in the forward pass and scaled in the backward.

Logits are (N, V), or (B, V, P) where the classes are not innermost: row b P + p is then logits[b, :, p], and is read where it
lies, a block at a time.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ._rows import compute_dtype

# Elements a block holds: large beside the 50 us that its torch calls cost in Python, small beside a core's cache. Measured by
# `python -m bench.cpu --sweep`.
BLOCK_ELEMENTS = 1 << 17
# Where several threads take blocks, each call may have to wait for another to give up Python's lock: fewer and larger where
# a block takes many calls, as the forward pass does, and less so where it takes few.
SHARED_BLOCK_ELEMENTS = 1 << 21
SHARED_SCALED_ELEMENTS = 1 << 18
# And where each torch call is itself spread over the threads, which then wait for each other at its end.
WIDE_BLOCK_ELEMENTS = 1 << 20
# More threads would wait for Python's lock, of which every block takes 50 us.
MAX_WORKERS = 16
# Rows whose weights and values are computed at once, likewise.
PIECE_ROWS = 1 << 15
SHARED_PIECE_ROWS = 1 << 17
# A row of fewer positions than this side by side is transposed within its block.
NARROW = 16


_T = TypeVar("_T")
_R = TypeVar("_R")


# ---- Threads


class _Runtime(NamedTuple):
    """The calls that set how many threads the parallel regions of *this* thread use, in the libraries torch is linked with.

    torch.set_num_threads would do the same and change it for every thread that is started later as well.
    """

    openmp: Callable[[int], None]
    # MKL's exp starts threads of its own unless it is told not to. Returns the number before.
    mkl: Callable[[int], int]


@cache
def _runtime() -> _Runtime | None:
    """None where torch's threads are not OpenMP's or the calls are not found."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        openmp = library.omp_set_num_threads
        mkl = library.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else lambda number: 0
    except (OSError, AttributeError):
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    return _Runtime(openmp, mkl)


# `threads`, on a thread that is calm: how many it would have used.
_local = threading.local()


def _threads() -> int:
    return min(getattr(_local, "threads", None) or torch.get_num_threads(), MAX_WORKERS)


@contextmanager
def calm() -> Iterator[None]:
    """Torch calls of this thread start no others, for which they would wait at the end of every exp of 2048 numbers or more."""
    runtime = _runtime()
    if runtime is None or getattr(_local, "threads", None):
        yield
        return
    # The first call gives a new thread the process's number, which would otherwise replace ours later.
    before = torch.get_num_threads()
    runtime.openmp(1)
    mkl = runtime.mkl(1)
    _local.threads = before
    try:
        yield
    finally:
        _local.threads = None
        runtime.openmp(before)
        runtime.mkl(mkl)


@contextmanager
def _spread(threads: int) -> Iterator[None]:
    """Within `calm`, torch calls are spread over `threads` after all."""
    runtime = _runtime()
    if runtime:
        runtime.openmp(threads)
    try:
        yield
    finally:
        if runtime:
            runtime.openmp(1)


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """After a fork the child has none of the threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _workers() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(MAX_WORKERS - 1, "fused_dm")
        return _pool


def _share(threads: int, count: int, start: Callable[[], Callable[[int], None]]) -> None:
    """Call `start()(number)` for every number below `count`, on several threads or on this one, `start` once on each.

    The threads take numbers as they come, so that one which shares its core with a busy process holds up no other.
    """
    remaining, lock = iter(range(count)), threading.Lock()
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            step = start()
            while True:
                with lock:
                    number = next(remaining, None)
                if number is None:
                    return
                step(number)

    def help_out() -> None:
        with calm():
            take()

    helpers = [_workers().submit(help_out) for _ in range(threads - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            helper.result()


def _run(
    matrix: Tensor,
    work: Callable[["_Blocks"], Callable[[int, Tensor], None]],
    dtype: torch.dtype | None,
    shared_elements: int,
) -> None:
    """Cut `matrix` into blocks and call `work(blocks)(number, scratch)` for each, on torch.get_num_threads() threads.

    The scratch memory holds a block in `dtype`, and nothing where that is None.

    A matrix of fewer blocks than threads is left to one thread; unless it is large, that is, of few and very long rows. Then
    each torch call is spread over the threads.
    """
    if not matrix.numel():
        return
    with calm():
        threads = _threads()
        # Two blocks a thread at least, so that one which is held up leaves work to the others.
        largest = max(BLOCK_ELEMENTS, matrix.numel() // (2 * threads))
        blocks = _Blocks(matrix, min(shared_elements, largest) if threads > 1 else BLOCK_ELEMENTS)
        shared = threads > 1 and _runtime() is not None and len(blocks) >= threads
        spread = threads > 1 and not shared and matrix.numel() >= WIDE_BLOCK_ELEMENTS
        if not shared and threads > 1:
            blocks = _Blocks(matrix, WIDE_BLOCK_ELEMENTS if spread else BLOCK_ELEMENTS)
        step = work(blocks)

        def start() -> Callable[[int], None]:
            scratch = torch.empty(0) if dtype is None else blocks.scratch(dtype)
            return lambda number: step(number, scratch)

        with _spread(threads) if spread else nullcontext():
            _share(threads if shared else 1, len(blocks), start)


def pieces(rows: int) -> list[slice]:
    """Parts of the rows whose temporaries stay in a core's cache, or are large beside what sharing them costs; one at least."""
    threads = _threads() if _runtime() else 1
    size = PIECE_ROWS if threads == 1 else max(PIECE_ROWS, min(SHARED_PIECE_ROWS, -(-rows // threads)))
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def each(function: Callable[[_T], _R], parts: Sequence[_T]) -> list[_R]:
    """What `function` gives for every part, on the threads of `_run` where there are several."""
    if len(parts) == 1:
        return [function(parts[0])]
    found: list[_R | None] = [None] * len(parts)

    def step(number: int) -> None:
        found[number] = function(parts[number])

    with calm():
        _share(min(_threads(), len(parts)) if _runtime() else 1, len(parts), lambda: step)
    return cast(list[_R], found)


# ---- Blocks


class _Blocks:
    """Whole rows of a matrix (N, V) or (B, V, P), about `elements` of it in a block."""

    def __init__(self, matrix: Tensor, elements: int) -> None:
        classes = matrix.shape[1]
        self.rows = matrix.shape[0]
        self.positions = 0
        self.height = max(1, elements // classes)
        if matrix.dim() == 3:
            # Whole planes, or where one is too large a part of it.
            self.positions = matrix.shape[2]
            self.height = max(1, elements // (classes * self.positions))
            self.width = min(self.positions, max(NARROW, elements // classes))
        self.height = min(self.height, self.rows)
        self.shape = (self.height, classes, *([self.width] if self.positions else []))

    def __len__(self) -> int:
        across = -(-self.positions // self.width) if self.positions else 1
        return -(-self.rows // self.height) * across

    def of(self, matrix: Tensor) -> Sequence[Tensor]:
        """The blocks of a tensor of the matrix's shape, as views."""
        if not self.positions:
            return matrix.split(self.height)
        return [part for planes in matrix.split(self.height) for part in planes.split(self.width, 2)]

    def of_rows(self, values: Tensor) -> Sequence[Tensor]:
        """The blocks of one number a row, (N,), as views that are broadcast against those of the matrix."""
        return self.of(values.view(self.rows, 1, self.positions) if self.positions else values[:, None])

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Memory for a block, which has its classes innermost where there are few positions beside each other."""
        if self.positions and self.width < NARROW:
            return torch.empty((self.height, self.width, self.shape[1]), dtype=dtype).movedim(2, 1)
        return torch.empty(self.shape, dtype=dtype)


def _like(scratch: Tensor, block: Tensor) -> Tensor:
    """The part of the scratch memory that holds a block, which the last ones do not fill."""
    if scratch.shape == block.shape:
        return scratch
    if block.dim() == 2 or block.shape[2] == scratch.shape[2]:
        return scratch[: block.shape[0]]
    return scratch[: block.shape[0], :, : block.shape[2]]


def _new_gradient(logits: Tensor) -> Tensor:
    """An empty tensor of the logits' shape and dtype, on huge pages where Linux gives them on request.

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


# ---- The passes


class _Pass:
    """Labels and row statistics of one walk over the logits."""

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> None:
        self.dtype = compute_dtype(logits.dtype)
        self.valid = target != ignore_index
        target = target.long()
        # Mostly all are labels, which one look at the largest and the smallest shows.
        lowest, highest = target.aminmax() if target.numel() else (target.sum(), target.sum())
        if lowest >= 0 and highest < logits.shape[1]:
            self.label = target
        else:
            check_labels(target, self.valid, logits.shape[1], ignore_index)
            self.label = torch.where(self.valid, target, 0)
        # Row by row what a matrix without classes has.
        self.row_max = logits.new_full(target.shape, torch.finfo(self.dtype).min, dtype=self.dtype)
        self.row_sum, self.label_logit = (logits.new_zeros(target.shape, dtype=self.dtype) for _ in range(2))
        self.logits = logits
        self.transform = transform

    def slope(self, block: Tensor) -> Tensor | None:
        """Memory for the derivative of a block's logits as the loss takes them by those that are given; None if that is 1."""
        return None if self.transform is None else torch.empty_like(block)

    def blocks(self, blocks: _Blocks) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        """A function that fills a block with exp(z - lse) over all classes but the label, and notes the rows' statistics.

        It returns the labels' places; their entries are left to the caller. A `slope` is filled.
        """
        logits, labels = blocks.of(self.logits), blocks.of_rows(self.label)
        label_logits, maxima, sums = (blocks.of_rows(rows) for rows in (self.label_logit, self.row_max, self.row_sum))
        lowest, nothing = torch.finfo(self.dtype).min, self.label_logit.new_full((), -math.inf)

        def fill(number: int, out: Tensor, slope: Tensor | None) -> Tensor:
            label, row_max = labels[number], maxima[number]
            out.copy_(logits[number])
            if self.transform is not None:
                _transform_(out, self.transform, slope)
            torch.gather(out, 1, label, out=label_logits[number])
            out.scatter_(1, label, nothing.expand(label.shape))
            torch.amax(out, 1, keepdim=True, out=row_max)
            # -inf less the lowest number is still -inf, where -inf less -inf is nan.
            row_max.clamp_(min=lowest)
            # The label's entry becomes exp(0) = 1 and is taken off again: torch's exp is ten times slower where it meets -inf.
            out.scatter_(1, label, row_max)
            out.sub_(row_max).exp_()
            row_sum = torch.sum(out, 1, keepdim=True, out=sums[number]).sub_(1)
            # 1 or more; or 0 where no other class has a finite logit, and then so is the row.
            out.mul_(row_sum.clamp(min=0.5).reciprocal_())
            return label

        return fill

    def margins(self) -> tuple[Tensor, Tensor]:
        """The rows' margin and z_y - max; nan for ignored rows and for a label at +inf."""

        def of(rows: slice) -> tuple[Tensor, Tensor]:
            label_logit = self.label_logit[rows]
            lead = label_logit.masked_fill(~self.valid[rows] | (label_logit == math.inf), math.nan) - self.row_max[rows]
            return lead - self.row_sum[rows].log(), lead

        with calm():
            margins, leads = zip(*each(of, pieces(len(self.valid))), strict=True)
        return torch.cat(margins), torch.cat(leads)


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


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N): max, sum, lead."""
    walk = _Pass(logits, target, ignore_index, transform)

    def work(blocks: _Blocks) -> Callable[[int, Tensor], None]:
        fill, parts = walk.blocks(blocks), blocks.of(logits)

        def step(number: int, scratch: Tensor) -> None:
            fill(number, _like(scratch, parts[number]), None)

        return step

    _run(logits, work, walk.dtype, SHARED_BLOCK_ELEMENTS)
    margins, lead = walk.margins()
    return margins, torch.stack([walk.row_max, walk.row_sum, lead])


def direction(
    logits: Tensor, target: Tensor, ignore_index: int, out: Tensor | None = None, transform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Margins and leads (N,), and the gradient for k = 1: exp(z_j - lse), and -1 for the label, times the slope.

    `out` may be the logits themselves.
    """
    walk = _Pass(logits, target, ignore_index, transform)
    out = _new_gradient(logits) if out is None else out
    direct = out.dim() == 2 and out.dtype == walk.dtype
    # Faster than the number itself.
    minus_one = walk.label_logit.new_full((), -1.0)

    def work(blocks: _Blocks) -> Callable[[int, Tensor], None]:
        fill, parts = walk.blocks(blocks), blocks.of(out)

        def step(number: int, scratch: Tensor) -> None:
            part = parts[number]
            block = part if direct else _like(scratch, part)
            slope = walk.slope(block)
            label = fill(number, block, slope)
            block.scatter_(1, label, minus_one.expand(label.shape))
            if slope is not None:
                block.mul_(slope)
            if not direct:
                part.copy_(block)

        return step

    _run(logits, work, None if direct else walk.dtype, SHARED_BLOCK_ELEMENTS)
    return *walk.margins(), out


def _zero_rows_(matrix: Tensor, zero: Tensor) -> None:
    """Fill the rows of `matrix` that `zero` (N,) tells, whatever they hold."""
    if not zero.any():
        return
    if matrix.dim() == 2:
        matrix.index_fill_(0, zero.nonzero()[:, 0], 0.0)
    else:
        matrix.masked_fill_(zero.view(matrix.shape[0], 1, matrix.shape[2]), 0.0)


def scale_rows_(matrix: Tensor, factor: Tensor) -> None:
    """Multiply each row of `matrix` by its factor (N,), rounding once; a factor of 0 gives 0 whatever the row holds."""
    direct = matrix.dtype == factor.dtype

    def work(blocks: _Blocks) -> Callable[[int, Tensor], None]:
        parts, factors = blocks.of(matrix), blocks.of_rows(factor)

        def step(number: int, scratch: Tensor) -> None:
            part = parts[number]
            if direct:
                part.mul_(factors[number])
            else:
                part.copy_(_like(scratch, part).copy_(part).mul_(factors[number]))

        return step

    _run(matrix, work, None if direct else factor.dtype, SHARED_SCALED_ELEMENTS)
    _zero_rows_(matrix, factor == 0)


def margin_gradient(
    logits: Tensor,
    target: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    out: Tensor | None = None,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits for a derivative by the margin (N,), from the logits. `out` may be the logits themselves."""
    walk = _Pass(logits, target, ignore_index, transform)
    out = _new_gradient(logits) if out is None else out
    given = out

    def work(blocks: _Blocks) -> Callable[[int, Tensor], None]:
        fill, parts, factors = walk.blocks(blocks), blocks.of(given), blocks.of_rows(dmargin.contiguous())

        def step(number: int, scratch: Tensor) -> None:
            part = parts[number]
            block = _like(scratch, part)
            slope = walk.slope(block)
            label = fill(number, block, slope)
            # Where the sum is 0, so is the block, and the label's entry is filled with 0 below.
            block.mul_(-factors[number]).scatter_(1, label, factors[number])
            if slope is not None:
                block.mul_(slope)
            part.copy_(block)

        return step

    _run(logits, work, walk.dtype, SHARED_BLOCK_ELEMENTS)
    _zero_rows_(out, ~walk.valid | (dmargin == 0) | (walk.row_sum == 0))
    return out
