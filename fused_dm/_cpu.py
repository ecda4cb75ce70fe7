"""The CPU implementation: blocks of whole rows, exponentiated once in the forward pass and scaled in the backward.

Logits are (N, V), or (B, V, P) where the classes are not innermost: row b P + p is then logits[b, :, p], and is read where it
lies, a block at a time. What is done with a block is in `_walk`; here is how blocks are cut and shared among threads.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ._rows import compute_dtype
from ._walk import walks

# Elements a block holds: large beside the 26 us that its torch calls cost, small enough for a core's cache. Measured by
# `python -m bench.cpu --sweep`.
BLOCK_ELEMENTS = 1 << 17
# A part is this share of the blocks a thread that are left, so that a thread which is held up leaves work to the others and the
# last parts, for whose end the others wait, are small; and the least blocks of a part, beside which the 30 us to take one are
# small.
PART_SHARE = 0.5
PART_BLOCKS = 2
# Where each torch call is itself spread over the threads, which then wait for each other at its end.
WIDE_BLOCK_ELEMENTS = 1 << 20
# Rows that a thread computes with at once where it needs Python's lock for each torch call. They are the same for any number of
# threads, as weights that are out of range are rounded relative to their piece.
PIECE_ROWS = 1 << 17
# Rows that go through several torch calls at a time: their temporaries stay in a core's cache.
STEP_ROWS = 1 << 15
# Bytes from which a gradient asks for its memory.
HUGE_BYTES = 1 << 22
HUGE_PAGE = 1 << 21
# Of Linux 5.14; older ones answer that they do not know it.
MADV_POPULATE_WRITE = 23
# Classes of a row, or positions of a plane, from which the quicker call for 16 bits is quicker; bytes of rows that it takes at
# once.
LONG = 512
SMALL_BYTES = 1 << 24
# Sums of exponentials of logits that no maximum is subtracted from. What a coefficient divided by a sum loses below the
# smallest normal is then below it in the product with an exponential or the sum too, and so is what an exponential loses in the
# quotient by its sum. The least is above that of probabilities, as models that end in log_softmax have sums of 1, or nearly.
LEAST_SUM = 2.0
LARGEST_SUM = 2.0**24
# Classes from which it pays to try: what is done for each row besides is then little.
SEVERAL = 16
# Positions of a block are a multiple of this many, so that every class begins on a cache line.
ALIGNED = 64
# A row of fewer positions than this side by side is transposed within its block.
NARROW = 16


_T = TypeVar("_T")
_R = TypeVar("_R")


# ---- Threads


class _Runtime(NamedTuple):
    """Calls of the libraries that torch is linked with, for the threads of *one* thread's parallel regions.

    torch.set_num_threads would set their number too, and change it for every thread that is started later as well.
    """

    set_threads: Callable[[int], None]
    # MKL's exp starts threads of its own unless it is told not to. Returns the number before.
    set_mkl_threads: Callable[[int], int]
    # OpenMP's parallel region, as GCC calls it (LLVM's and Intel's libraries have it too): function, its argument, threads, 0.
    parallel: Callable[[Callable[[int | None], None], None, int, int], None]


_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _runtime() -> _Runtime | None:
    """None where torch's threads are not OpenMP's or the calls are not found."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        openmp, parallel = library.omp_set_num_threads, library.GOMP_parallel
        mkl = library.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else lambda number: 0
    except (OSError, AttributeError):
        return None
    openmp.argtypes, openmp.restype = [ctypes.c_int], None
    parallel.argtypes, parallel.restype = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return _Runtime(openmp, mkl, parallel)


_forked = False


def _after_a_fork() -> None:
    """The child has none of OpenMP's threads, whose library would wait for them."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_a_fork)


# `threads`, on a thread that is calm: how many it would have used.
_local = threading.local()


def _threads() -> int:
    return 1 if _forked else getattr(_local, "threads", None) or torch.get_num_threads()


@contextmanager
def calm() -> Iterator[None]:
    """Torch calls of this thread start no others, for which they would wait at the end of every exp of 2048 numbers or more."""
    runtime = _runtime()
    if runtime is None or getattr(_local, "threads", None):
        yield
        return
    # The first call gives a new thread the process's number, which would otherwise replace ours later.
    before = torch.get_num_threads()
    runtime.set_threads(1)
    mkl = runtime.set_mkl_threads(1)
    _local.threads = before
    try:
        yield
    finally:
        _local.threads = None
        runtime.set_threads(before)
        runtime.set_mkl_threads(mkl)


@contextmanager
def _spread(threads: int) -> Iterator[None]:
    """Within `calm`, torch calls are spread over `threads` after all."""
    runtime = _runtime()
    if runtime:
        runtime.set_threads(threads)
    try:
        yield
    finally:
        if runtime:
            runtime.set_threads(1)


def _share(threads: int, count: int, start: Callable[[], Callable[[int], None]], inference: bool) -> None:
    """Call `start()(number)` for every number below `count`, on several threads or on this one, `start` once on each.

    The threads are those that torch has its own calls run on: they are awake where torch was busy a moment ago, and would
    be in the way of any others. They take numbers as they come, so that one which shares its core with a busy process holds
    up no other. With `inference`, torch calls cost less, and what they make is not to leave the calls.
    """
    runtime = _runtime()
    inference = inference or torch.is_inference_mode_enabled()
    if threads == 1 or runtime is None:
        with calm(), torch.inference_mode() if inference else torch.no_grad():
            step = start()
            for number in range(count):
                step(number)
        return
    remaining, lock = iter(range(count)), threading.Lock()
    failures: list[BaseException] = []

    def take(_: int | None = None) -> None:
        try:
            with calm(), torch.inference_mode() if inference else torch.no_grad():
                step = start()
                while True:
                    with lock:
                        number = next(remaining, None)
                    if number is None:
                        return
                    step(number)
        except BaseException as error:
            # No exception gets through a parallel region.
            failures.append(error)

    runtime.parallel(_Body(take), None, threads, 0)
    if failures:
        raise failures[0]


def _parts(blocks: int, threads: int) -> list[tuple[int, int]]:
    """First blocks and ends of the parts that threads take one after another; one at least for each, if there are as many."""
    least = min(PART_BLOCKS, max(1, blocks // threads))
    parts, begin = [], 0
    while begin < blocks:
        end = min(blocks, begin + max(least, math.ceil((blocks - begin) * PART_SHARE / threads)))
        parts.append((begin, end))
        begin = end
    return parts


def _run(
    matrix: Tensor,
    work: Callable[["_Blocks", Tensor | None, int, int], None],
    dtype: torch.dtype | None,
    beside: Callable[[], None] | None = None,
) -> None:
    """Call `work(blocks, scratch, begin, end)` for parts of the blocks of `matrix`, on torch.get_num_threads() threads.

    The scratch memory holds a block in `dtype`; there is none where that is None. What is to be done beside is begun first.

    A matrix of fewer blocks than threads is left to one thread; unless it is large, that is, of few and very long rows. Then
    each torch call is spread over the threads.
    """
    if not matrix.numel():
        return
    with calm():
        threads = _threads()
        blocks = _Blocks(matrix, BLOCK_ELEMENTS)
        shared = threads > 1 and _runtime() is not None and len(blocks) >= threads
        spread = threads > 1 and not shared and matrix.numel() >= WIDE_BLOCK_ELEMENTS
        if spread:
            blocks = _Blocks(matrix, WIDE_BLOCK_ELEMENTS)
        count = len(blocks)
        parts = _parts(count, threads) if shared else [(0, count)]
        extra = 0 if beside is None else 1

        def start() -> Callable[[int], None]:
            scratch = None if dtype is None else blocks.scratch(dtype)

            def step(number: int) -> None:
                if beside is not None and number == 0:
                    beside()
                else:
                    work(blocks, scratch, *parts[number - extra])

            return step

        with _spread(threads) if spread else nullcontext():
            _share(threads if shared else 1, extra + len(parts), start, inference=True)


def pieces(rows: int) -> list[slice]:
    """Parts of the rows that are large beside what a part costs, whose temporaries do not leave the caches; one at least."""
    return [slice(first, min(first + PIECE_ROWS, rows)) for first in range(0, max(rows, 1), PIECE_ROWS)]


def each(function: Callable[[_T], _R], parts: Sequence[_T]) -> list[_R]:
    """What `function` gives for every part, on the threads of `_run` where there are several."""
    if len(parts) == 1:
        return [function(parts[0])]
    found: list[_R | None] = [None] * len(parts)

    def step(number: int) -> None:
        found[number] = function(parts[number])

    with calm():
        _share(min(_threads(), len(parts)) if _runtime() else 1, len(parts), lambda: step, inference=False)
    return cast(list[_R], found)


# ---- What a look at a tensor tells, which on a GPU would stop the host


def are_moderate(margins: Tensor) -> bool:
    """Whether none of them (N,) is nan or beyond 1e15."""
    return float(torch.dot(margins, margins)) < 1e30


def number(tensor: Tensor) -> float:
    return float(tensor)


def numbers(tensor: Tensor) -> list[float]:
    return cast(list[float], tensor.tolist())


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest number that fp64 or fp32 has."""
    return number if dtype == torch.float64 else ctypes.c_float(number).value


def exp(number: float) -> float:
    """Of any number; infinite where fp64 has it not."""
    try:
        return math.exp(number)
    except OverflowError:
        return math.inf


def is_between(number: Tensor, least: float, most: float) -> bool:
    """Whether its magnitude is at least `least` and at most `most`."""
    return least <= abs(float(number)) <= most


def is_below(number: Tensor, limit: float) -> bool:
    """Whether it is finite and less."""
    return -math.inf < float(number) < limit


# ---- Numbers of the rows


class Counted(NamedTuple):
    """Rows of which all that count have finite numbers; the others have the margin and the log |c| of one that counts."""

    margin: Tensor  # (N,)
    sign: Tensor | None  # of c, (N,), 0 for rows that do not count; None where it is 1
    log_size: Tensor | None  # log |c|, (N,); None where it is 0


def counted(margin: Tensor, moderate: bool, weight: Tensor | None, target: Tensor, ignore_index: int) -> Counted | None:
    """`Counted` of margins and weights c (N,), or None where a row that counts has a number that is not finite.

    A `weight` of None is 1, and `moderate` whether all of the margins are.
    """
    sign, size = None, weight
    if weight is not None:
        least, most = map(float, weight.aminmax())
        if not (math.isfinite(least) and math.isfinite(most)):
            return None
        if least < 0:
            sign, size = weight.sign(), weight.abs()
        all_count = not least <= 0 <= most
    else:
        # The margin of an ignored row is nan.
        all_count = moderate
    if all_count:
        return Counted(margin, sign, None if size is None else size.log()) if moderate else None
    parts, dead = pieces(len(margin)), torch.empty_like(margin, dtype=torch.bool)
    # What makes a row dead.
    given, what = (target, ignore_index) if weight is None else (weight, 0)
    each(lambda rows: torch.eq(given[rows], what, out=dead[rows]), parts)
    some = _first_that_counts(dead)
    if some is None:
        return None
    margins = torch.empty_like(margin)
    sizes = None if size is None else torch.empty_like(size)
    signs = torch.empty_like(margin) if sign is None else sign

    def of(rows: slice) -> bool:
        dead_rows, found = dead[rows], margins[rows]
        torch.where(dead_rows, margin[some], margin[rows], out=found)
        if size is not None and sizes is not None:
            torch.where(dead_rows, size[some], size[rows], out=sizes[rows]).log_()
        if sign is None:
            torch.logical_not(dead_rows, out=signs[rows])
        return are_moderate(found)

    return Counted(margins, signs, sizes) if all(each(of, parts)) else None


def _first_that_counts(dead: Tensor) -> int | None:
    """Where `dead` (N,) is False first, None where it is not."""
    # Mostly it is among the first, and a look at all is slow.
    for rows in (dead[:STEP_ROWS], dead):
        if not rows.all():
            return int(rows.byte().argmin())
    return None


def _by_steps(rows: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for parts of the steps of that many rows, on the threads where there are several steps.

    What torch calls make there is not to leave it.
    """
    steps = -(-rows // STEP_ROWS)
    with calm():
        threads = min(_threads(), steps) if _runtime() else 1
        if threads <= 1:
            work(0, steps)
            return
        parts = _parts(steps, threads)
        _share(threads, len(parts), lambda: lambda number: work(*parts[number]), inference=True)


def logarithms(margins: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q of margins (N,), none of them nan."""
    log_p, log_q = torch.empty_like(margins), torch.empty_like(margins)
    _by_steps(len(margins), lambda begin, end: walks().logarithms(margins, log_p, log_q, STEP_ROWS, begin, end))
    return log_p, log_q


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
) -> tuple[float, float, Tensor]:
    """Sums of the weights and of the values, and coefficients (N,): see `_walk.weigh`.

    The sums do not depend on the number of threads.
    """
    coefficient = torch.empty_like(log_weight)
    sums = log_weight.new_empty((2, -(-len(log_weight) // STEP_ROWS)), dtype=torch.float64)
    given = (log_weight, log_q, value, sign, row_weight, eps, top, absolute, has_loss, coefficient, sums, STEP_ROWS)
    _by_steps(len(log_weight), lambda begin, end: walks().weigh(*given, begin, end))
    weights, values = numbers(sums.sum(1))
    return weights, values, coefficient


# ---- Blocks


class _Blocks:
    """The blocks of a matrix (B, V, P), of about `elements` each."""

    def __init__(self, matrix: Tensor, elements: int) -> None:
        self.planes, self.classes, self.positions = matrix.shape
        # Whole planes, or where one is too large a part of it.
        self.height = min(self.planes, max(1, elements // (self.classes * self.positions)))
        self.width = min(self.positions, max(NARROW, elements // self.classes))
        if ALIGNED < self.width < self.positions:
            self.width = self.width // ALIGNED * ALIGNED

    def __len__(self) -> int:
        return -(-self.planes // self.height) * -(-self.positions // self.width)

    def scratch(self, dtype: torch.dtype) -> Tensor:
        """Memory for a block, which has its classes innermost where there are few positions beside each other."""
        shape = (self.height, self.classes, self.width)
        if self.width < NARROW:
            return torch.empty_strided(shape, (self.width * self.classes, 1, self.classes), dtype=dtype, device="cpu")
        return torch.empty(shape, dtype=dtype, device="cpu")


def _planes(matrix: Tensor) -> Tensor:
    """Logits (N, V) as (N, V, 1); (B, V, P) as they are. Without what autograd knows of them."""
    return matrix.detach().unsqueeze(2) if matrix.dim() == 2 else matrix.detach()


def _new_gradient(logits: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """An empty tensor of the logits' shape and dtype, and what there is to do before it is filled, beside other work.

    A gradient is new memory in every step, and the faults on its pages of 4 KiB cost as much as the computation; those on huge
    pages cost several threads, which get in each other's way, twice what they cost one. So it asks for huge pages, as numpy
    does for its own arrays, and one thread asks for all of them while others begin to compute. Both are hints: where they are
    not granted, nothing else changes.
    """
    out = logits.new_empty(logits.shape)
    size = out.numel() * out.element_size()
    if sys.platform != "linux" or size < HUGE_BYTES:
        return out, None
    start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (out.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    # The request takes its time where an allocator has kept the pages, as a few of them show.
    if all(_is_there(start + length * part // 4 // mmap.PAGESIZE * mmap.PAGESIZE) for part in range(4)):
        return out, None
    _advise(start, length, mmap.MADV_HUGEPAGE)

    def populate() -> None:
        for done in range(0, length, HUGE_PAGE):
            _advise(start + done, min(HUGE_PAGE, length - done), MADV_POPULATE_WRITE)

    return out, populate


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _advise(start: int, length: int, advice: int) -> None:
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))


def _is_there(page: int) -> bool:
    """Whether a page of this process has memory."""
    answer = ctypes.create_string_buffer(1)
    known = _libc().mincore(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), answer) == 0
    return known and answer.raw[0] & 1 == 1


def checked_labels(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The labels (N,) with 0 for ignored rows, and which rows are not ignored; None where none is.

    Raises:
        IndexError: a label is no class.
    """
    valid = None
    # Mostly all are labels, which one look at the largest and the smallest shows.
    lowest, highest = _range(target)
    label = target
    if not (lowest >= 0 and highest < classes and not lowest <= ignore_index <= highest):
        valid, label, nothing = torch.empty_like(target, dtype=torch.bool), torch.empty_like(target), target.new_zeros(())

        def of(rows: slice) -> tuple[int, int]:
            valid_rows, labels = valid[rows], label[rows]
            torch.ne(target[rows], ignore_index, out=valid_rows)
            torch.where(valid_rows, target[rows], nothing, out=labels)
            return _range(labels)

        least, most = zip(*each(of, pieces(len(target))), strict=True)
        lowest, highest = min(least), max(most)
    if lowest >= 0 and highest < classes:
        return label, valid
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    at = int(wrong.nonzero()[0])
    raise IndexError(
        f"target: expected labels in [0, {classes}) or ignore_index={ignore_index}, got {int(target[at])} at row {at}"
    )


def _range(target: Tensor) -> tuple[int, int]:
    """The smallest and the largest label, 0 and 0 where there is none."""
    least, most = target.aminmax() if target.numel() else (0, 0)
    return int(least), int(most)


# ---- The passes


class _Pass:
    """Labels and row statistics of one walk over the logits; leads only where they are wanted."""

    def __init__(
        self, logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None, leads: bool = True
    ) -> None:
        self.dtype = compute_dtype(logits.dtype)
        self.label, self.valid = checked_labels(target.long(), logits.shape[1], ignore_index)
        # Row by row what a matrix without classes has, if that is what it is.
        least = torch.finfo(self.dtype).min
        self.row_shift, self.row_sum, self.label_logit, self.margin, *lead = (
            logits.new_empty(target.shape, dtype=self.dtype)
            if logits.numel()
            else logits.new_full(target.shape, value, dtype=self.dtype)
            for value in (least, 0.0, 0.0, math.inf, *([-least] if leads else []))
        )
        self.lead = lead[0] if leads else None
        self.logits = logits
        self.transform = transform

    def run(
        self,
        out: Tensor | None,
        factor: Tensor | None = None,
        undivided: bool = False,
        beside: Callable[[], None] | None = None,
        tries: bool = True,
    ) -> None:
        """Note the rows' statistics, and fill `out` with the gradient for k = -`factor`, for k = 1 or for k = `row_sum`.

        Unless it `tries` to do without them, all maxima are subtracted.
        """
        logits = _planes(self.logits)
        gradient = None if out is None else _planes(out)
        rows = (logits.shape[0], 1, logits.shape[2])
        label, label_logit, row_shift, row_sum = (
            values.view(rows) for values in (self.label, self.label_logit, self.row_shift, self.row_sum)
        )
        lead = None if self.lead is None else self.lead.view(rows)
        factors = None if factor is None else factor.detach().contiguous().view(rows)
        # Whole rows in the dtype of the statistics are computed where they lie. Strided ones are faster computed elsewhere.
        direct = out is not None and out.dim() == 2 and out.dtype == self.dtype
        lowest = torch.finfo(self.dtype).min
        overwrites = direct and out is not None and out.data_ptr() == self.logits.data_ptr()
        trial = None
        if tries and logits.shape[1] >= SEVERAL and logits.numel():
            # With a transform, maxima come first: it is applied once more to a block that goes the wrong way.
            trial = torch.tensor(self.transform is None, device="cpu")

        def work(blocks: _Blocks, scratch: Tensor | None, begin: int, end: int) -> None:
            walks().walk(
                logits,
                label,
                label_logit,
                row_shift,
                row_sum,
                lead,
                gradient,
                scratch,
                factors,
                undivided,
                self.transform,
                lowest,
                LEAST_SUM,
                LARGEST_SUM,
                trial,
                overwrites,
                blocks.height,
                blocks.width,
                begin,
                end,
            )

        _run(logits, work, None if direct and not (overwrites and trial is not None) else self.dtype, beside)
        if logits.numel():
            given = (self.label_logit, self.row_shift, self.row_sum, self.margin, STEP_ROWS)
            _by_steps(len(self.margin), lambda begin, end: walks().margins(*given, begin, end))

    def margins(self) -> Tensor:
        """The rows' margin, nan for ignored rows and for a label at +inf."""
        nothing = None if self.valid is None else ~self.valid
        # One look at the sum spares one at every row.
        if not math.isfinite(self.label_logit.sum()):
            infinite = self.label_logit == math.inf
            nothing = infinite if nothing is None else nothing | infinite
        if nothing is not None:
            each(lambda rows: self.margin[rows].masked_fill_(nothing[rows], math.nan), pieces(len(nothing)))
        return self.margin


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N): m, the sum of exp(z_j - m), 0 where no other class has any probability, lead."""
    walk = _Pass(logits, target, ignore_index, transform)
    walk.run(None)
    return walk.margins(), torch.stack([walk.row_shift, walk.row_sum, cast(Tensor, walk.lead)])


def direction(
    logits: Tensor, target: Tensor, ignore_index: int, out: Tensor, transform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Margins and leads (N,). `out` becomes the gradient for k = 1: exp(z_j - lse), and -1 for the label, times the slope.

    It may be the logits themselves.
    """
    walk = _Pass(logits, target, ignore_index, transform)
    # In place that takes memory, and pays little beside the products that its callers compute.
    walk.run(out, tries=False)
    return walk.margins(), cast(Tensor, walk.lead)


def undivided_direction(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    leads: bool,
    out: Tensor | None = None,
    transform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margins, leads and norms (N,), and the gradient for k = norm: exp(z_j - m), and -norm for the label, times the slope.

    m is the maximum, or 0 in blocks that need none subtracted. The norm is the sum of exp(z_j - m), but 1/2 where no other
    class has a finite logit, whose gradient is 0, and infinite for a row of nan. With a transform it is 1 throughout: its
    slope, times a large sum, could be infinite. There are no leads, (0,), unless they are wanted. `out` may be the logits
    themselves.
    """
    walk = _Pass(logits, target, ignore_index, transform, leads)
    out, populate = _new_gradient(logits) if out is None else (out, None)
    walk.run(out, undivided=transform is None, beside=populate)
    norms, lead = walk.row_sum, walk.margin.new_empty(0) if walk.lead is None else walk.lead
    # One look at the margins spares three at the rows: where they are finite, so is the label's logit, and no sum is 0 or nan.
    if transform is None and walk.valid is None and are_moderate(walk.margin):
        return walk.margin, lead, norms, out
    margins = walk.margins()
    if transform is not None:
        norms.fill_(1.0)
    elif not math.isfinite(norms.clamp_(min=0.5).sum()):
        norms.nan_to_num_(nan=math.inf)
    return margins, lead, norms, out


def _zero_rows_(matrix: Tensor, zero: Tensor) -> None:
    """Fill the rows of `matrix` that `zero` (N,) tells, whatever they hold."""
    if matrix.dim() == 2:
        matrix.index_fill_(0, zero.nonzero()[:, 0], 0.0)
    else:
        matrix.masked_fill_(zero.view(matrix.shape[0], 1, matrix.shape[2]), 0.0)


def scale_rows_(matrix: Tensor, factor: Tensor, norm: Tensor | None = None) -> None:
    """Multiply each row of `matrix` by its factor (N,), rounding once; a factor of 0 gives 0 whatever the row holds.

    A finite sum of `norm` (N,) tells that no row holds nan or inf.
    """
    factor = factor.detach().contiguous()
    if not len(factor):
        return
    same = matrix.dtype == factor.dtype
    least, most = map(float, factor.aminmax())
    # The call for 16 bits would make nan of a row whose factor is infinite.
    if not same and _is_long(matrix) and matrix.is_contiguous() and math.isfinite(least) and math.isfinite(most):
        _scale_16_bits_(matrix.detach(), factor)
    else:
        planes = _planes(matrix)
        factors = factor.view(planes.shape[0], 1, planes.shape[2])

        def work(blocks: _Blocks, scratch: Tensor | None, begin: int, end: int) -> None:
            walks().scale(planes, factors, scratch, blocks.height, blocks.width, begin, end)

        _run(planes, work, None if same else factor.dtype)
    # The least tells it mostly, and counting takes half as long as finding them.
    if least > 0 or (norm is not None and math.isfinite(norm.sum())):
        return
    if factor.count_nonzero() < len(factor):
        _zero_rows_(matrix, factor == 0)


def _is_long(matrix: Tensor) -> bool:
    """Whether the quicker call for 16 bits is quicker."""
    return (matrix.shape[1] if matrix.dim() == 2 else matrix.shape[2]) >= LONG


def _scale_16_bits_(matrix: Tensor, factor: Tensor) -> None:
    """The same for contiguous (N, V) or (B, V, P) and finite factors in fp32."""
    if matrix.dim() == 3:
        planes = len(matrix)

        with calm():
            threads = _threads()
            if planes >= threads and _runtime():
                parts = _parts(planes, threads)
                some = walks().scale_planes_16_bits
                _share(threads, len(parts), lambda: lambda number: some(matrix, factor, *parts[number]), inference=True)
            else:
                with _spread(threads):
                    walks().scale_planes_16_bits(matrix, factor, 0, planes)
        return
    if matrix.nbytes <= SMALL_BYTES:
        with calm(), _spread(_threads()):
            walks().scale_16_bits(matrix, None, None, factor, len(matrix), 0, 1)
        return
    bits = matrix.view(dtype=torch.int16)

    def work(blocks: _Blocks, scratch: Tensor | None, begin: int, end: int) -> None:
        walks().scale_16_bits(matrix, bits, bits.new_empty(()), factor, blocks.height, begin, end)

    _run(_planes(matrix), work, None)


@calm()
def margin_gradient(
    logits: Tensor,
    target: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    out: Tensor | None = None,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits for a derivative by the margin (N,), from the logits. `out` may be the logits themselves."""
    walk = _Pass(logits, target, ignore_index, transform, leads=False)
    out, populate = _new_gradient(logits) if out is None else (out, None)
    walk.run(out, dmargin, beside=populate)
    # Where no other class has any probability there is no gradient, unless the derivative is nan.
    zero = (dmargin == 0) | (walk.row_sum == 0) & ~dmargin.isnan()
    if walk.valid is not None:
        zero |= ~walk.valid
    if zero.any():
        _zero_rows_(out, zero)
    return out
