"""The operators: torch.library registrations around the implementations, with fake kernels and autograd.

Hyper-parameters reach an operator as a family's name and an fp64 tensor, so that changing one neither recompiles nor
synchronises. An operator computes on the logits' device by the implementation that its name or `impl` says. `transform` is None
or the logits' scale and, if there are two, the softcap, in an fp64 tensor.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import _cpu, _launch
from ._operator import is_batch, operator
from ._rows import compute_dtype


def _triton():
    from . import _triton

    return _triton


def _gradient_like(logits: Tensor) -> Tensor:
    """An empty tensor for the gradient of logits (N, V) or (images, V, D), as the kernels write it.

    It is what `torch.empty_like` makes, but for room of less than 16 bytes between rows, and between images, where the logits
    have room there: then rows begin alike in both, and are written 16 bytes at a time. No decision depends on a number of rows,
    which compiled code may not know.
    """
    positions_first = logits.dim() == 3 and logits.stride(0) < logits.stride(2)
    if logits.stride(1) != 1 or positions_first or not _launch.shifted(logits.shape[1]):
        return torch.empty_like(logits)
    unit = 16 // logits.dtype.itemsize
    strides, room = [1] * logits.dim(), logits.shape[1]
    for dim in (2, 0) if logits.dim() == 3 else (0,):
        strides[dim] = room + (logits.stride(dim) - room) % unit
        room = strides[dim] * logits.shape[dim]
    return logits.new_empty_strided(logits.shape, strides)


def _only_once(ctx, dvalue: Tensor) -> None:
    """Refuse a second backward, several at once, and one that is itself to be differentiated: it would use up a buffer."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "dm_loss: create_graph=True asks for a second derivative; the gradient is defined, not derived, and has none"
        )
    if is_batch(dvalue):
        raise RuntimeError(
            "dm_loss(inplace=True): expected one derivative of the loss, got several at once (is_grads_batched=True), whose "
            "gradients the logits' memory cannot hold; pass inplace=False"
        )
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "dm_loss: the gradient's buffer was used up by the first backward pass; call dm_loss again instead of "
            "backward(retain_graph=True), or pass impl='reference'"
        )
    ctx.consumed = True


def _times(coefficient: Tensor, dvalue: Tensor) -> Tensor:
    """The product, (N,), with 0 for rows that do not count whatever their derivative is."""
    return torch.where(coefficient == 0, torch.zeros_like(coefficient), coefficient * dvalue)


def _calm_on_a_cpu(tensor: Tensor) -> AbstractContextManager:
    """In a backward pass, where a forked child would wait for threads that it has not."""
    return _cpu.calm() if tensor.device.type == "cpu" else nullcontext()


# ---- margin: the differentiable operator over the logits


@operator("fused_dm::margin2")
def margin(
    logits: Tensor, target: Tensor, ignore_index: int, impl: str, transform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N) of logits (N, V); for Triton kernels also (images, V, D), N = images * D."""
    implementation = _triton() if impl == "triton" else _cpu
    return implementation.margin(logits, target, ignore_index, transform)


@margin.register_fake
def _(logits, target, ignore_index, impl, transform=None):
    dtype = compute_dtype(logits.dtype)
    rows = target.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((3, rows), dtype=dtype)


@operator("fused_dm::margin_gradient2")
def margin_gradient(
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    impl: str,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits (N, V) for a derivative by the margins (N,)."""
    if impl == "triton":
        dlogits = _gradient_like(logits)
        _triton().gradient(logits, target, statistics, None, dmargin, ignore_index, dlogits, transform=transform)
        return dlogits
    return _cpu.margin_gradient(logits, target, dmargin, ignore_index, transform=transform)


@margin_gradient.register_fake
def _(logits, target, statistics, dmargin, ignore_index, impl, transform=None):
    return _gradient_like(logits) if impl == "triton" else logits.new_empty(logits.shape)


@operator("fused_dm::margin_gradient2_", mutates_args=["logits"])
def margin_gradient_(
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    impl: str,
    transform: Tensor | None = None,
) -> None:
    """Overwrite the logits by dlogits for a derivative by the margins (N,)."""
    if impl == "triton":
        _triton().gradient(logits, target, statistics, None, dmargin, ignore_index, logits, transform=transform)
    else:
        _cpu.margin_gradient(logits, target, dmargin, ignore_index, out=logits, transform=transform)


def _margin_setup(ctx, inputs, output) -> None:
    # Else the statistics, which have no derivative, would be given one of zeros: a launch.
    ctx.set_materialize_grads(False)
    logits, target, ctx.ignore_index, ctx.impl, transform = inputs
    ctx.save_for_backward(logits, target, output[1], transform)


def _margin_backward(ctx, dmargin, _):
    if dmargin is None:
        return None, None, None, None, None
    logits, target, statistics, transform = ctx.saved_tensors
    dlogits = margin_gradient(logits, target, statistics, dmargin, ctx.ignore_index, ctx.impl, transform)
    return dlogits, None, None, None, None


margin.register_autograd(_margin_backward, setup_context=_margin_setup)


@operator("fused_dm::attach_to_margin", returns="value")
def attach_to_margin(margin: Tensor, value: Tensor, coefficient: Tensor) -> Tensor:
    """`value`, () or (N,), with the derivative `coefficient` (N,) by the margins."""
    return value.clone()


@attach_to_margin.register_fake
def _(margin, value, coefficient):
    return torch.empty_like(value)


def _attach_to_margin_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _attach_to_margin_backward(ctx, dvalue):
    (coefficient,) = ctx.saved_tensors
    with _calm_on_a_cpu(coefficient):
        return _times(coefficient, dvalue), None, None


attach_to_margin.register_autograd(_attach_to_margin_backward, setup_context=_attach_to_margin_setup)


# ---- The logits are overwritten by their gradient (inplace=True)


class _Taken(torch.autograd.Function):
    """The logits under another name, which stands in the graph where they stood."""

    @staticmethod
    def forward(ctx, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, dlogits):
        return dlogits


class _Overwritten(torch.autograd.Function):
    """The logits as everyone else knows them from now on: a gradient that arrives here comes from a later use of them."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, dlogits):
        raise RuntimeError(
            "dm_loss(inplace=True): the logits were used again after the loss had overwritten them; use them before it, take "
            "what is needed from return_output=True, or pass inplace=False"
        )


def take(logits: Tensor) -> Tensor:
    """The logits for the loss alone: a backward pass through any later use of them is an error.

    Traced code cannot be told so, and gets them as they are.
    """
    if torch.compiler.is_compiling():
        return logits
    taken = _Taken.apply(logits)
    _Overwritten.apply(logits)
    return taken


@operator("fused_dm::attach_overwriting2", returns="value")
def attach_overwriting(
    logits: Tensor,
    value: Tensor,
    target: Tensor,
    statistics: Tensor,
    coefficient: Tensor,
    ignore_index: int,
    impl: str,
    transform: Tensor | None = None,
) -> Tensor:
    """`value`, () or (N,), whose gradient overwrites the logits in the backward: row by row, `coefficient` (N,) times that
    of the negative margin.
    """
    return value.clone()


@attach_overwriting.register_fake
def _(logits, value, target, statistics, coefficient, ignore_index, impl, transform=None):
    return torch.empty_like(value)


def _attach_overwriting_setup(ctx, inputs, output) -> None:
    logits, _, target, statistics, coefficient, ctx.ignore_index, ctx.impl, transform = inputs
    ctx.save_for_backward(logits.detach(), target, statistics, coefficient, transform)


def _attach_overwriting_backward(ctx, dvalue):
    _only_once(ctx, dvalue)
    dlogits, target, statistics, coefficient, transform = ctx.saved_tensors
    with _calm_on_a_cpu(coefficient):
        dmargin = -_times(coefficient, dvalue)
    margin_gradient_(dlogits, target, statistics, dmargin, ctx.ignore_index, ctx.impl, transform)
    return dlogits, None, None, None, None, None, None, None


attach_overwriting.register_autograd(_attach_overwriting_backward, setup_context=_attach_overwriting_setup)


# ---- CPU: the direction is written in the forward and scaled in place in the backward


@operator("fused_dm::cpu_direction4")
def cpu_direction(
    logits: Tensor, target: Tensor, ignore_index: int, leads: bool, transform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margins, leads, (0,) unless wanted, and norms (N,), and the gradient (N, V) for a coefficient that is the norm."""
    return _cpu.undivided_direction(logits, target, ignore_index, leads, transform=transform)


@cpu_direction.register_fake
def _(logits, target, ignore_index, leads, transform=None):
    dtype = compute_dtype(logits.dtype)
    rows = target.shape[0]
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if leads else 0, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(logits.shape),
    )


@operator("fused_dm::cpu_direction4_", mutates_args=["logits"])
def cpu_direction_(
    logits: Tensor, target: Tensor, ignore_index: int, leads: bool, transform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Margins, leads, (0,) unless wanted, and norms (N,); the logits are overwritten by the gradient for a coefficient that is
    the norm.
    """
    return _cpu.undivided_direction(logits, target, ignore_index, leads, out=logits, transform=transform)[:3]


@cpu_direction_.register_fake
def _(logits, target, ignore_index, leads, transform=None):
    dtype = compute_dtype(logits.dtype)
    rows = target.shape[0]
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows if leads else 0, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


@operator("fused_dm::scale_rows4_", mutates_args=["matrix"])
def scale_rows_(matrix: Tensor, coefficient: Tensor, norm: Tensor, dvalue: Tensor, shows: bool) -> None:
    """Multiply each row of `matrix` by its coefficient, (N,), and `dvalue`, () or (N,), and divide it by its norm, in place.

    `shows` tells that the norm of a row that is not finite is infinite.
    """
    # A forked child would wait for threads that it has not, were there a call outside.
    with _cpu.calm():
        by = _cpu.number(dvalue) if dvalue.dim() == 0 else math.nan
        if not math.isfinite(by):
            coefficient = _times(coefficient, dvalue)
        elif by != 1:
            coefficient = coefficient * by
        # The norm comes last: a coefficient divided by it may have no digits before it meets a large `dvalue`.
        _cpu.scale_rows_(matrix, coefficient / norm, norm if shows else None)


@operator("fused_dm::scaled_rows2")
def scaled_rows(matrix: Tensor, coefficient: Tensor, norm: Tensor, dvalue: Tensor, shows: bool) -> Tensor:
    """What `scale_rows_` makes of a copy of `matrix`."""
    scaled = matrix.clone()
    scale_rows_(scaled, coefficient, norm, dvalue, shows)
    return scaled


@scaled_rows.register_fake
def _(matrix, coefficient, norm, dvalue, shows):
    return torch.empty_like(matrix)


@operator("fused_dm::attach_direction3", returns="value")
def attach_direction(
    logits: Tensor, value: Tensor, direction: Tensor, coefficient: Tensor, norm: Tensor, shows: bool
) -> Tensor:
    """`value`, () or (N,), whose gradient by the logits is `direction` with its rows times `coefficient` / `norm`.

    `shows` tells that the norm of a row of the direction that is not finite is infinite.
    """
    return value.clone()


@attach_direction.register_fake
def _(logits, value, direction, coefficient, norm, shows):
    return torch.empty_like(value)


def _attach_direction_setup(ctx, inputs, output) -> None:
    *tensors, ctx.shows = inputs[2:]
    ctx.save_for_backward(*tensors)


def _attach_direction_backward(ctx, dvalue):
    if is_batch(dvalue):
        return scaled_rows(*ctx.saved_tensors, dvalue, ctx.shows), None, None, None, None, None
    _only_once(ctx, dvalue)
    direction, coefficient, norm = ctx.saved_tensors
    scale_rows_(direction, coefficient, norm, dvalue, ctx.shows)
    return direction, None, None, None, None, None


attach_direction.register_autograd(_attach_direction_backward, setup_context=_attach_direction_setup)


# ---- Triton: the fused path


@operator("fused_dm::triton_divisor")
def triton_divisor(
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    classes: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The sum of the examples' weights, () fp64; 1 where it has nothing to divide. The weights are rounded to `dtype`."""
    return _triton().divisor(target, weight, sample_weight, classes, ignore_index, dtype)


@triton_divisor.register_fake
def _(target, weight, sample_weight, classes, ignore_index, dtype):
    return target.new_empty((), dtype=torch.float64)


@operator("fused_dm::triton_loss3")
def triton_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    params: Tensor,
    normalizer: Tensor | None,
    family: str,
    ignore_index: int,
    transform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), rows (7, N) and totals (3,); the logits are read once."""
    given = (logits, target, weight, sample_weight, params, normalizer, family, ignore_index)
    return _triton().loss_and_rows(*given, transform=transform)


@triton_loss.register_fake
def _(logits, target, weight, sample_weight, params, normalizer, family, ignore_index, transform=None):
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((7, target.shape[0]), dtype=dtype),
        logits.new_empty(3, dtype=torch.float64),
    )


@operator("fused_dm::triton_received")
def triton_received(target: Tensor, rows: Tensor, totals: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each row received, (N,): its share of the weights, its label's probability; the sum of weights; whether correct."""
    return _triton().received(target, rows, totals, ignore_index)


@triton_received.register_fake
def _(target, rows, totals, ignore_index):
    numbers = target.shape[0]
    return (
        rows.new_empty(numbers),
        rows.new_empty(numbers),
        totals.new_empty(()),
        target.new_empty(numbers, dtype=torch.bool),
    )


@operator("fused_dm::triton_gradient2")
def triton_gradient(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor,
    dloss: Tensor,
    ignore_index: int,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits (N, V); the logits are read once. `dloss` is () or, for a loss per row, (N,)."""
    dlogits = _gradient_like(logits)
    _triton().gradient(logits, target, rows, totals, dloss, ignore_index, dlogits, transform=transform)
    return dlogits


@triton_gradient.register_fake
def _(logits, target, rows, totals, dloss, ignore_index, transform=None):
    return _gradient_like(logits)


@operator("fused_dm::triton_gradient2_", mutates_args=["logits"])
def triton_gradient_(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor,
    dloss: Tensor,
    ignore_index: int,
    transform: Tensor | None = None,
) -> None:
    """Overwrite the logits by dlogits."""
    _triton().gradient(logits, target, rows, totals, dloss, ignore_index, logits, transform=transform)


def _triton_loss_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    logits, target, _, _, _, _, _, ctx.ignore_index, transform = inputs
    ctx.save_for_backward(logits, target, output[1], output[2], transform)


def _triton_loss_backward(ctx, dloss, _, __):
    if dloss is None:
        return None, None, None, None, None, None, None, None, None
    logits, target, rows, totals, transform = ctx.saved_tensors
    dlogits = triton_gradient(logits, target, rows, totals, dloss, ctx.ignore_index, transform)
    return dlogits, None, None, None, None, None, None, None, None


triton_loss.register_autograd(_triton_loss_backward, setup_context=_triton_loss_setup)


@operator("fused_dm::attach_rows2", returns="value")
def attach_rows(
    logits: Tensor,
    value: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor,
    ignore_index: int,
    inplace: bool,
    transform: Tensor | None = None,
) -> Tensor:
    """`value`, () or (N,), whose gradient by the logits is computed from the rows' numbers in the backward, over the logits
    if `inplace`.
    """
    return value.clone()


@attach_rows.register_fake
def _(logits, value, target, rows, totals, ignore_index, inplace, transform=None):
    return torch.empty_like(value)


def _attach_rows_setup(ctx, inputs, output) -> None:
    logits, _, target, rows, totals, ctx.ignore_index, ctx.inplace, transform = inputs
    ctx.save_for_backward(logits.detach() if ctx.inplace else logits, target, rows, totals, transform)


def _attach_rows_backward(ctx, dvalue):
    if ctx.inplace:
        _only_once(ctx, dvalue)
        dlogits, target, rows, totals, transform = ctx.saved_tensors
        triton_gradient_(dlogits, target, rows, totals, dvalue, ctx.ignore_index, transform)
    else:
        logits, target, rows, totals, transform = ctx.saved_tensors
        dlogits = triton_gradient(logits, target, rows, totals, dvalue, ctx.ignore_index, transform)
    return dlogits, None, None, None, None, None, None, None


attach_rows.register_autograd(_attach_rows_backward, setup_context=_attach_rows_setup)


# ---- Triton: the gradient for dloss = 1 is written in the forward


@operator("fused_dm::triton_fused3")
def triton_fused(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    params: Tensor,
    normalizer: Tensor,
    family: str,
    ignore_index: int,
    transform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), rows (7, N), totals (3,) and dlogits (N, V) for dloss = 1, from the single fused kernel."""
    dlogits = _gradient_like(logits)
    given = (logits, target, weight, sample_weight, params, normalizer, family, ignore_index)
    found = _triton().loss_and_rows(*given, dlogits, transform)
    return *found, dlogits


@triton_fused.register_fake
def _(logits, target, weight, sample_weight, params, normalizer, family, ignore_index, transform=None):
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((7, target.shape[0]), dtype=dtype),
        logits.new_empty(3, dtype=torch.float64),
        _gradient_like(logits),
    )


@operator("fused_dm::triton_fused3_", mutates_args=["logits"])
def triton_fused_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    params: Tensor,
    normalizer: Tensor,
    family: str,
    ignore_index: int,
    transform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), rows (7, N) and totals (3,); the logits are overwritten by dlogits for dloss = 1."""
    given = (logits, target, weight, sample_weight, params, normalizer, family, ignore_index)
    return _triton().loss_and_rows(*given, logits, transform)


@triton_fused_.register_fake
def _(logits, target, weight, sample_weight, params, normalizer, family, ignore_index, transform=None):
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((7, target.shape[0]), dtype=dtype),
        logits.new_empty(3, dtype=torch.float64),
    )


@operator("fused_dm::triton_multiply_", mutates_args=["dlogits"])
def triton_multiply_(dlogits: Tensor, dloss: Tensor) -> None:
    """Multiply dlogits by dloss (); nothing is written where it is 1."""
    _triton().multiply_(dlogits, dloss)


@operator("fused_dm::attach_overwritten", returns="value")
def attach_overwritten(logits: Tensor, value: Tensor, dlogits: Tensor) -> Tensor:
    """`value` (), whose gradient by the logits is `dlogits` times its derivative. The logits themselves are gone."""
    return value.clone()


@attach_overwritten.register_fake
def _(logits, value, dlogits):
    return torch.empty_like(value)


def _attach_overwritten_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _attach_overwritten_backward(ctx, dvalue):
    _only_once(ctx, dvalue)
    (dlogits,) = ctx.saved_tensors
    triton_multiply_(dlogits, dvalue)
    return dlogits, None, None


attach_overwritten.register_autograd(_attach_overwritten_backward, setup_context=_attach_overwritten_setup)


@operator("fused_dm::triton_rescale2_", mutates_args=["dlogits"])
def triton_rescale_(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor,
    dloss: Tensor,
    ignore_index: int,
    transform: Tensor | None = None,
) -> None:
    """Replace the gradient for dloss = 1 by that for `dloss` (), computed anew; nothing is written where it is 1."""
    _triton().gradient(logits, target, rows, totals, dloss, ignore_index, dlogits, skip_one=True, transform=transform)


@operator("fused_dm::attach_gradient2", returns="value")
def attach_gradient(
    logits: Tensor,
    value: Tensor,
    dlogits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor,
    ignore_index: int,
    transform: Tensor | None = None,
) -> Tensor:
    """`value` (), whose gradient by the logits is `dlogits` times its derivative."""
    return value.clone()


@attach_gradient.register_fake
def _(logits, value, dlogits, target, rows, totals, ignore_index, transform=None):
    return torch.empty_like(value)


def _attach_gradient_setup(ctx, inputs, output) -> None:
    logits, _, dlogits, target, rows, totals, ctx.ignore_index, transform = inputs
    ctx.save_for_backward(logits, dlogits, target, rows, totals, transform)


def _attach_gradient_backward(ctx, dvalue):
    if is_batch(dvalue):
        logits, _, target, rows, totals, transform = ctx.saved_tensors
        dlogits = triton_gradient(logits, target, rows, totals, dvalue, ctx.ignore_index, transform)
        return dlogits, None, None, None, None, None, None, None
    _only_once(ctx, dvalue)
    logits, dlogits, target, rows, totals, transform = ctx.saved_tensors
    triton_rescale_(dlogits, logits, target, rows, totals, dvalue, ctx.ignore_index, transform)
    return dlogits, None, None, None, None, None, None, None


attach_gradient.register_autograd(_attach_gradient_backward, setup_context=_attach_gradient_setup)
