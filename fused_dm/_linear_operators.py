"""The operators of the last layer and the loss together, with fake kernels and autograd; see _operators.py."""

import torch
from torch import Tensor

from . import _cpu, _linear_blocks
from ._linear_blocks import How, Layer, Wanted, Weighting, layer_of
from ._operator import is_batch, operator
from ._rows import compute_dtype

# Of a power of 2 by which derivatives in fp32 are divided, before it is itself divided by the headroom.
LEAST_UNIT = 2.0**-100


def _once(ctx) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_dm_loss: create_graph=True asks for a second derivative; the gradient is defined, not derived, and has none"
        )
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "linear_dm_loss: the gradients' buffers were used up by the first backward pass; call linear_dm_loss again instead "
            "of backward(retain_graph=True), or pass recompute=True"
        )
    ctx.consumed = True


def _checked(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, impl: str, dtype) -> Layer:
    if impl == "cpu":
        _cpu.checked_labels(target, weight.shape[0], ignore_index)
    return layer_of(input, weight, bias, dtype)


def _kept(target: Tensor, ignore_index: int, drop: bool) -> Tensor | None:
    """The rows that are not ignored, if those are to be left out: the host waits for their number."""
    return (target != ignore_index).nonzero()[:, 0] if drop else None


def _only(layer: Layer, kept: Tensor) -> Layer:
    return layer._replace(input=layer.input.index_select(0, kept))


def _spread(values: Tensor, kept: Tensor, rows: int, fill: float) -> Tensor:
    """The columns or elements of the rows kept, in their places among all; elsewhere `fill`."""
    whole = values.new_full((*values.shape[:-1], rows), fill)
    return whole.index_copy_(values.dim() - 1, kept, values)


def _spread_rows(values: Tensor, kept: Tensor, rows: int) -> Tensor:
    return values.new_zeros((rows, values.shape[1])).index_copy_(0, kept, values) if values.dim() == 2 else values


def _empty(like: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
    if like is None or not wanted:
        return torch.empty(0, dtype=dtype, device="cpu") if like is None else like.new_empty(0, dtype=dtype)
    return like.new_empty(like.shape, dtype=dtype)


# ---- The gradients are accumulated in the forward and scaled in the backward


@operator("fused_dm::linear_gradients")
def linear_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    params: Tensor,
    family: str,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
    relative: bool,
    drop: bool,
    max_bytes: int | None,
    impl: str,
    transform: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Margins and leads (N,), a reference (), and the gradients by input (N, H), weight (V, H) and bias (V,) where `wanted`.

    The gradients are for dloss exp(reference) / D = 1, in the compute dtype. The logits are of `dtype`.
    """
    layer = _checked(input, weight, bias, target, ignore_index, impl, dtype)
    kept, rows = _kept(target, ignore_index, drop), input.shape[0]
    if kept is not None:
        layer, target = _only(layer, kept), target[kept]
        row_weight = None if row_weight is None else row_weight[kept]
    weighting = Weighting(row_weight, params, family, relative)
    found = _linear_blocks.gradients(layer, target, weighting, Wanted(*wanted), How(ignore_index, transform, max_bytes, impl))
    if kept is not None:
        found = found._replace(
            margin=_spread(found.margin, kept, rows, torch.nan),
            lead=_spread(found.lead, kept, rows, torch.nan),
            input=_spread_rows(found.input, kept, rows),
        )
    return found.margin, found.lead, found.reference, found.input, found.weight, found.bias


@linear_gradients.register_fake
def _(
    input,
    weight,
    bias,
    target,
    row_weight,
    params,
    family,
    ignore_index,
    dtype,
    wanted,
    relative,
    drop,
    max_bytes,
    impl,
    transform,
):
    compute, rows = compute_dtype(dtype), input.shape[0]
    shapes = (tuple(input.shape), tuple(weight.shape), (weight.shape[0],))
    return (
        input.new_empty(rows, dtype=compute),
        input.new_empty(rows, dtype=compute),
        input.new_empty((), dtype=compute),
        *(input.new_empty(shape if want else (0,), dtype=compute) for shape, want in zip(shapes, wanted, strict=True)),
    )


@operator("fused_dm::linear_scale_", mutates_args=["gradient"])
def linear_scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient by its factor ()."""
    _linear_blocks.scaled(gradient, factor, gradient.dtype)


@operator("fused_dm::linear_scaled")
def linear_scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times its factor (), rounded to `dtype`, in a tensor of its own."""
    return _linear_blocks.scaled(gradient.clone() if gradient.dtype == dtype else gradient, factor, dtype)


@linear_scaled.register_fake
def _(gradient, factor, dtype):
    return torch.empty_like(gradient, dtype=dtype)


@operator("fused_dm::attach_linear_gradients", returns="value")
def attach_linear_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    dinput: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    factor: Tensor,
) -> Tensor:
    """`value` (), whose gradients by input, weight and bias are the given ones times `factor` and its derivative."""
    return value.clone()


@attach_linear_gradients.register_fake
def _(input, weight, bias, value, dinput, dweight, dbias, factor):
    return torch.empty_like(value)


def _attach_linear_gradients_setup(ctx, inputs, output) -> None:
    *parameters, _, dinput, dweight, dbias, factor = inputs
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    ctx.save_for_backward(dinput, dweight, dbias, factor)


def _attach_linear_gradients_backward(ctx, dvalue):
    several = is_batch(dvalue)
    if not several:
        _once(ctx)
    *buffers, factor = ctx.saved_tensors
    factor = factor * dvalue
    gradients: list[Tensor | None] = []
    for buffer, dtype, needed in zip(buffers, ctx.dtypes, ctx.needs_input_grad, strict=False):
        if not needed:
            gradients.append(None)
        elif buffer.dtype == dtype and not several:
            linear_scale_(buffer, factor)
            gradients.append(buffer)
        else:
            gradients.append(linear_scaled(buffer, factor, dtype))
    return *gradients, None, None, None, None, None


attach_linear_gradients.register_autograd(_attach_linear_gradients_backward, setup_context=_attach_linear_gradients_setup)


# ---- The margins, differentiable: the logits are computed again in the backward


@operator("fused_dm::linear_margin")
def linear_margin(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    drop: bool,
    sparse: bool,
    max_bytes: int | None,
    impl: str,
    transform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N) of the logits of a layer, in `dtype`.

    With `drop`, ignored rows are left out of the products; with `sparse`, so are, in the backward, rows whose margin has the
    derivative 0.
    """
    layer = _checked(input, weight, bias, target, ignore_index, impl, dtype)
    kept = _kept(target, ignore_index, drop)
    how = How(ignore_index, transform, max_bytes, impl)
    if kept is None:
        return _linear_blocks.margins(layer, target, how)
    margin, statistics = _linear_blocks.margins(_only(layer, kept), target[kept], how)
    return _spread(margin, kept, len(target), torch.nan), _spread(statistics, kept, len(target), torch.nan)


@linear_margin.register_fake
def _(input, weight, bias, target, ignore_index, dtype, drop, sparse, max_bytes, impl, transform):
    compute, rows = compute_dtype(dtype), input.shape[0]
    return input.new_empty(rows, dtype=compute), input.new_empty((3, rows), dtype=compute)


@operator("fused_dm::linear_margin_gradients")
def linear_margin_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    dmargin: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
    sparse: bool,
    max_bytes: int | None,
    impl: str,
    transform: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by input (N, H), weight (V, H) and bias (V,) where `wanted`, for a derivative by the margins (N,)."""
    layer, rows = layer_of(input, weight, bias, dtype), input.shape[0]
    kept = (dmargin != 0).nonzero()[:, 0] if sparse else None
    if kept is not None:
        layer, target, dmargin = _only(layer, kept), target[kept], dmargin[kept]
        statistics = statistics.index_select(1, kept)
    unit = None
    if dtype == torch.float16 and dmargin.numel():
        # A power of 2: divided already, the coefficients may be below the range of fp16. It is itself in the range of fp32.
        size = dmargin.abs()
        top = torch.where(size.isfinite(), size, 0.0).amax()
        top = torch.where(top > 0, top, 1.0).clamp(min=LEAST_UNIT)
        unit = torch.exp2(top.log2().floor())
        unit = unit * (2 / _linear_blocks.HEADROOM)
        dmargin = dmargin / unit
    found = _linear_blocks.margin_gradients(
        layer, target, statistics, dmargin, Wanted(*wanted), How(ignore_index, transform, max_bytes, impl)
    )
    given = (input, weight, weight if bias is None else bias)
    dinput, dweight, dbias = (
        _linear_blocks.scaled(buffer, unit, like.dtype) for buffer, like in zip(found, given, strict=True)
    )
    return dinput if kept is None else _spread_rows(dinput, kept, rows), dweight, dbias


@linear_margin_gradients.register_fake
def _(input, weight, bias, target, statistics, dmargin, ignore_index, dtype, wanted, sparse, max_bytes, impl, transform):
    given = ((input.shape, input), (weight.shape, weight), (weight.shape[:1], weight if bias is None else bias))
    return tuple(like.new_empty(shape if want else (0,)) for (shape, like), want in zip(given, wanted, strict=True))


def _linear_margin_setup(ctx, inputs, output) -> None:
    input, weight, bias, target, ctx.ignore_index, ctx.dtype, _, ctx.sparse, ctx.max_bytes, ctx.impl, transform = inputs
    ctx.save_for_backward(input, weight, bias, target, output[1], transform)


def _linear_margin_backward(ctx, dmargin, _):
    input, weight, bias, target, statistics, transform = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = linear_margin_gradients(
        input,
        weight,
        bias,
        target,
        statistics,
        dmargin,
        ctx.ignore_index,
        ctx.dtype,
        wanted,
        ctx.sparse,
        ctx.max_bytes,
        ctx.impl,
        transform,
    )
    given = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *given, None, None, None, None, None, None, None, None


linear_margin.register_autograd(_linear_margin_backward, setup_context=_linear_margin_setup)
