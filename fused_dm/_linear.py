"""The last linear layer and the loss together: `linear_dm_loss` and `LinearDMLoss`."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _linear_operators, _operators, _validation, edf, reference
from ._api import DMLoss, _bound, _default_eps, _emphasis, _normalizer, _params, _transform
from ._loss import Problem, Received, coefficients_of, of_margins, received, row_weights, weights_of

# A weight of exp(60) leaves fp32 a factor of 1e12 for sums over rows; row weights are brought below 2.
LOG_PEAK = 60.0
# Shares of a batch's gradient are counted in units of 2^-44: a sum of integers does not depend on its order.
SHARES = 1 << 44


class LinearDMOutput(NamedTuple):
    """What `linear_dm_loss` returns with `return_output=True`. All but `loss` are detached; ignored rows have 0, nan, False.

    Attributes:
        loss: the reduced loss, 0-d, or shaped like `target` for `reduction="none"`; fp32 (fp64 for fp64 inputs).
        example_weight: c w / D, shaped like `target`: the L1 norm of the gradient by the row's logits at eps = 0, with the sign
            of c.
        target_prob: p, shaped like `target`.
        sum_weight: 1e-8 + sum of c w, 0-d fp64.
        correct: whether the label's logit is at or above every other, shaped like `target`, bool.
        skipped: the share of the rows that are not ignored which `skip_tolerance` leaves out of the backward, 0-d fp32.
    """

    loss: Tensor
    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor
    skipped: Tensor


@functools.lru_cache(maxsize=1024)
def _log_peak(emphasis: edf.EDF) -> float:
    """About the largest log w, from a table."""
    # A mode, such as that of a tracer or of tensors without numbers, has nothing to do with it.
    with _disable_current_modes(), torch.no_grad():
        margin = torch.sinh(torch.linspace(-20, 20, 2001, dtype=torch.float64, device="cpu"))
        log_p, log_q = F.logsigmoid(margin), F.logsigmoid(-margin)
        return emphasis.log_weight(log_p, log_q).max().item()


def _may_overflow(emphasis: edf.EDF, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights are to be kept relative to the largest, as the undivided ones may leave the range of `dtype`."""
    if dtype == torch.float16:
        return True
    # A graph outlives the parameters' present values.
    if torch.compiler.is_compiling() or _validation.is_captured(device):
        return not emphasis.has_loss
    return not _log_peak(emphasis) <= LOG_PEAK


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a linear layer of this input, if it does."""
    device = input.device.type
    # Not every version of the compiler can trace the first question, and what it compiles for has autocast.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _about_1(weight: Tensor | None) -> tuple[Tensor | None, Tensor | float]:
    """Row weights divided by the power of 2 below the largest, and that, 0-d fp64: they are in the range of their dtype."""
    if weight is None or not weight.numel():
        return weight, 1.0
    size = weight.abs().double()
    largest = torch.where(size.isfinite(), size, 0.0).amax()
    unit = torch.exp2(torch.where(largest > 0, largest, 1.0).log2().floor())
    return (weight.double() / unit).to(weight.dtype), unit


def _skip(coefficient: Tensor, counted: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The coefficients with 0 for the rows to leave out, and their share among the counted rows.

    They are those with the smallest norms whose norms add up to at most `tolerance` of all; of equal ones, the first.
    """
    norm = coefficient.abs().double()
    share = norm / norm.sum()
    share = torch.where(norm == 0, torch.zeros_like(share), share.nan_to_num(1, 1, 1))
    share = (share * SHARES).ceil().long()
    ascending, order = torch.sort(share, stable=True)
    skipped = torch.zeros_like(counted).index_put_((order,), ascending.cumsum(0) <= int(tolerance * SHARES))
    rows = (skipped & counted).sum() / counted.sum().clamp(min=1)
    return torch.where(skipped, torch.zeros_like(coefficient), coefficient), rows.float()


class _Call(NamedTuple):
    """A checked call, flattened to rows; what is of order N is in the problem."""

    problem: Problem  # with the input in the place of the logits
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    in_forward: bool  # whether gradients, if wanted, are accumulated in the forward
    relative: bool  # to the largest weight
    skip_tolerance: float
    drop_ignored: bool
    max_logits_bytes: int | None
    impl: str


def _loss(call: _Call) -> tuple[Tensor, Received | None, Tensor]:
    problem = call.problem
    input, target, ignore_index = problem.logits, problem.target, problem.ignore_index
    given = (input, call.weight, call.bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in given]
    family = problem.emphasis.family
    skipped = torch.zeros((), dtype=torch.float32, device=input.device)
    if any(wanted) and call.in_forward and family is not None:
        weight, unit = _about_1(row_weights(problem))
        results = _linear_operators.linear_gradients(
            *(None if tensor is None else tensor.detach() for tensor in given),
            target,
            weight,
            problem.emphasis.params,
            family,
            ignore_index,
            call.dtype,
            wanted,
            call.relative,
            call.drop_ignored,
            call.max_logits_bytes,
            call.impl,
            problem.transform,
        )
        margin, lead, reference_log, *gradients = results
        found = of_margins(problem, margin, keep_weights=problem.return_output)
        totals = found.totals()
        factor = unit * torch.exp((reference_log - totals.log_scale).double()) / totals.divisor
        if problem.normalizer is not None:
            # Gradients of 0, divided by a 0 that says that no row counts.
            counts = target != ignore_index if weight is None else weight != 0
            factor = torch.where(counts.any() | factor.isfinite(), factor, 0.0)
        loss = _linear_operators.attach_linear_gradients(*given, found.loss, *gradients, factor.to(margin.dtype))
    else:
        sparse = call.skip_tolerance > 0 or call.drop_ignored
        margin, statistics = _linear_operators.linear_margin(
            *given,
            target,
            ignore_index,
            call.dtype,
            call.drop_ignored,
            sparse,
            call.max_logits_bytes,
            call.impl,
            problem.transform,
        )
        lead = statistics[2]
        found = of_margins(problem, margin, keep_weights=problem.return_output)
        loss, coefficient = found.loss, coefficients_of(found, margin.dtype)
        if call.skip_tolerance > 0:
            coefficient, skipped = _skip(coefficient, target != ignore_index, call.skip_tolerance)
        if any(wanted):
            loss = _operators.attach_to_margin(margin, loss, -coefficient)
    if not problem.return_output:
        return loss, None, skipped
    return loss, received(problem, margin.detach(), lead, *weights_of(found), found.totals()), skipped


def _compute(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: edf.EDF | Callable,
    params: Tensor | None,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    eps: float,
    softcap: float | Tensor | None,
    logit_scale: float | Tensor | None,
    recompute: bool,
    skip_tolerance: float,
    drop_ignored: bool,
    max_logits_bytes: int | None,
    return_output: bool,
    impl: str | None,
) -> Tensor | LinearDMOutput:
    autocast = _autocast_dtype(input) if isinstance(input, Tensor) else None
    _validation.check_linear(input, linear_weight, linear_bias, target, ignore_index, autocast is not None)
    _validation.check_linear_weights(input, linear_weight, target, weight, sample_weight)
    for name, value in (("normalizer", normalizer), ("softcap", softcap), ("logit_scale", logit_scale)):
        _validation.check_linear_scalar(name, value, input)
    impl = _validation.choose_impl(impl, input)
    given = (input, linear_weight, linear_bias, weight, sample_weight, normalizer, softcap, logit_scale)
    _validation.check_transforms(impl, *given)
    if drop_ignored and _validation.is_captured(input.device):
        raise RuntimeError("drop_ignored=True: expected a call outside CUDA graph capture, as it waits for the GPU")
    labels = target.reshape(-1).long()
    if _validation.validates_labels():
        _validation.check_labels(labels, linear_weight.shape[0], ignore_index)
    rows = input.reshape(-1, input.shape[-1])
    row_weight = None if sample_weight is None else sample_weight.reshape(-1)
    divisor = _normalizer(normalizer, input.device)
    if params is not None and params.device != input.device:
        params = None
    if impl == "reference":
        if skip_tolerance:
            raise ValueError(
                "skip_tolerance: expected impl 'triton' or 'cpu' with it, got 'reference', which leaves nothing out"
            )
        loss, *rest = reference.dm_loss(
            F.linear(rows, linear_weight, linear_bias),
            labels,
            _bound(emphasis, params),
            weight=weight,
            sample_weight=row_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=divisor,
            eps=eps if params is None else params[0],
            softcap=softcap,
            logit_scale=logit_scale,
        )
        got: Received | None = Received(*rest)
        skipped = torch.zeros((), device=input.device)
    else:
        dtype = input.dtype if autocast is None or input.dtype == torch.float64 else autocast
        if params is None:
            values = emphasis.params if isinstance(emphasis, edf.EDF) else ()
            params = _params((eps, *values), input.device)
        in_forward = not recompute and reduction != "none"
        problem = Problem(
            logits=rows,
            target=labels,
            weight=weight,
            sample_weight=row_weight,
            normalizer=divisor,
            emphasis=_emphasis(emphasis, params),
            reduction=reduction,
            ignore_index=ignore_index,
            return_output=return_output,
            inplace=False,
            transform=_transform(softcap, logit_scale, input.device),
        )
        call = _Call(
            problem,
            linear_weight,
            linear_bias,
            dtype,
            in_forward,
            in_forward and isinstance(emphasis, edf.EDF) and _may_overflow(emphasis, dtype, input.device),
            skip_tolerance,
            drop_ignored,
            max_logits_bytes,
            impl,
        )
        loss, got, skipped = _loss(call)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    if got is None or not return_output:
        return loss
    return LinearDMOutput(
        loss=loss,
        example_weight=got.example_weight.reshape(target.shape),
        target_prob=got.target_prob.reshape(target.shape),
        sum_weight=got.sum_weight,
        correct=got.correct.reshape(target.shape),
        skipped=skipped,
    )


@overload
def linear_dm_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: edf.EDF | str | Callable[[Tensor, Tensor], Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum_weight",
    normalizer: float | Tensor | None = None,
    eps: float | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    recompute: bool = False,
    skip_tolerance: float = 0.0,
    drop_ignored: bool = False,
    max_logits_bytes: int | None = None,
    return_output: Literal[False] = False,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor: ...


@overload
def linear_dm_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: edf.EDF | str | Callable[[Tensor, Tensor], Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum_weight",
    normalizer: float | Tensor | None = None,
    eps: float | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    recompute: bool = False,
    skip_tolerance: float = 0.0,
    drop_ignored: bool = False,
    max_logits_bytes: int | None = None,
    return_output: Literal[True],
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> LinearDMOutput: ...


@overload
def linear_dm_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: edf.EDF | str | Callable[[Tensor, Tensor], Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum_weight",
    normalizer: float | Tensor | None = None,
    eps: float | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    recompute: bool = False,
    skip_tolerance: float = 0.0,
    drop_ignored: bool = False,
    max_logits_bytes: int | None = None,
    return_output: bool,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor | LinearDMOutput: ...


def linear_dm_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: edf.EDF | str | Callable[[Tensor, Tensor], Tensor],
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum_weight",
    normalizer: float | Tensor | None = None,
    eps: float | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    recompute: bool = False,
    skip_tolerance: float = 0.0,
    drop_ignored: bool = False,
    max_logits_bytes: int | None = None,
    return_output: bool = False,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor | LinearDMOutput:
    """`dm_loss` of the logits of a linear layer, which never exist all at once.

    Value and gradients equal, but for rounding, those of::

        dm_loss(F.linear(input, linear_weight, linear_bias), target, emphasis, ...)

    with input (N, H), linear_weight (V, H) and logits (N, V). The rows are computed in blocks: a block of logits, the loss's
    pass over it, which overwrites it by its gradient, and that gradient's products with `linear_weight` and `input`. The
    gradients are accumulated in the forward, in fp32, before the divisor D is known, and multiplied once by dloss / D in the
    backward. So beyond inputs and gradients there is one block of logits, and for 16-bit weights the gradient's fp32 form.

    Args:
        input: (..., H), the layer's input; fp16, bf16, fp32 or fp64. Under autocast it is taken as a linear layer takes it.
        linear_weight: (V, H), of the dtype of `input` (any but fp64 under autocast); may be the weight of an embedding, too.
        target: (...), any integer dtype; labels in [0, V) or `ignore_index`.
        emphasis, weight, sample_weight, ignore_index, reduction, normalizer, eps, softcap, logit_scale, label_smoothing: see
            `dm_loss`.
        linear_bias: (V,), of the dtype of `input`.
        recompute: compute the logits again in the backward instead of accumulating gradients in the forward: four products
            instead of three, nothing of the size of the weight between the passes, and a backward that may run more than once.
            So it is for `reduction="none"` and for an emphasis without a fused form (a callable, a composition), whatever
            `recompute` is.
        skip_tolerance: with `recompute`, leave the rows with the smallest gradients out of the backward's products, as
            long as their L1 norms add up to at most this share of the batch's. The choice is deterministic, and so is the bound
            on the logits' gradient (that of the capped logits, with a softcap); costs a synchronisation in the backward. Pays
            where many examples are fitted and the emphasis gives them little: CCE, GCE, DFT, focal loss.
        drop_ignored: leave ignored rows out of the products; costs a synchronisation, in the backward of `recompute` another.
        max_logits_bytes: size of a block of logits, at least a row; on a CPU with the fp32 form of 16-bit ones. None for 512
            MiB on a GPU, and on a CPU four times the second-level caches, or 96 rows if that is more. The smaller it is, the
            slower are the products.
        return_output: return LinearDMOutput instead of the loss alone.
        impl: see `dm_loss`. "reference" materialises the logits.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), 0-d or shaped like `target` for "none"; or LinearDMOutput.

    Raises:
        TypeError, ValueError, IndexError: as `dm_loss`.
        RuntimeError: in a second backward through one loss, unless it is computed by `recompute`.

    Example:
        >>> import torch
        >>> from fused_dm import edf, linear_dm_loss
        >>> hidden = torch.randn(4, 8, requires_grad=True)
        >>> head = torch.nn.Linear(8, 1000)
        >>> loss = linear_dm_loss(
        ...     hidden, head.weight, torch.arange(4), edf.DM(beta=8, lambd=0.5), linear_bias=head.bias
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])

    Reference: Wang et al., Derivative Manipulation for General Example Weighting, arXiv 1905.11233.
    """
    _validation.check_options(reduction, normalizer, eps, label_smoothing)
    _validation.check_transform(softcap, logit_scale)
    _validation.check_linear_options(recompute, skip_tolerance, drop_ignored, max_logits_bytes, reduction)
    density = _validation.check_emphasis(emphasis)
    return _compute(
        input,
        linear_weight,
        target,
        density,
        None,
        linear_bias,
        weight,
        sample_weight,
        ignore_index,
        reduction,
        normalizer,
        _default_eps(density, eps),
        softcap,
        logit_scale,
        recompute,
        skip_tolerance,
        drop_ignored,
        max_logits_bytes,
        return_output,
        impl,
    )


class LinearDMLoss(DMLoss):
    """`linear_dm_loss` as a module. The layer is not the module's: its weight and bias are given to each call.

    Args:
        emphasis, weight, sample_weight, ignore_index, reduction, normalizer, eps, softcap, logit_scale, return_output,
            label_smoothing, impl: see `dm_loss`.
        recompute, skip_tolerance, drop_ignored, max_logits_bytes: see `linear_dm_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, here or when called; see `linear_dm_loss`.

    Example:
        >>> import torch
        >>> from fused_dm import LinearDMLoss
        >>> criterion = LinearDMLoss("dm:beta=8,lambd=0.5")
        >>> embedding = torch.nn.Embedding(1000, 8)
        >>> tokens = torch.randint(1000, (2, 6))
        >>> criterion(embedding(tokens[:, :-1]), embedding.weight, tokens[:, 1:]).backward()

    Reference: arXiv 1905.11233.
    """

    def __init__(
        self,
        emphasis: edf.EDF | str | Callable[[Tensor, Tensor], Tensor],
        *,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "sum_weight",
        normalizer: float | Tensor | None = None,
        eps: float | None = None,
        softcap: float | Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        recompute: bool = False,
        skip_tolerance: float = 0.0,
        drop_ignored: bool = False,
        max_logits_bytes: int | None = None,
        return_output: bool = False,
        label_smoothing: float = 0.0,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            emphasis,
            weight=weight,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            eps=eps,
            softcap=softcap,
            logit_scale=logit_scale,
            return_output=return_output,
            label_smoothing=label_smoothing,
            impl=impl,
        )
        _validation.check_linear_options(recompute, skip_tolerance, drop_ignored, max_logits_bytes, reduction)
        self.recompute = recompute
        self.skip_tolerance = skip_tolerance
        self.drop_ignored = drop_ignored
        self.max_logits_bytes = max_logits_bytes

    def extra_repr(self) -> str:
        usual = {"recompute": False, "skip_tolerance": 0, "drop_ignored": False, "max_logits_bytes": None}
        return super().extra_repr() + self._repr_of(usual)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | LinearDMOutput:
        """The loss; see `linear_dm_loss`. `sample_weight` and `normalizer`, if given, replace those of the module."""
        normalizer = self.normalizer if normalizer is None else normalizer
        self._check(normalizer)
        _validation.check_linear_options(
            self.recompute, self.skip_tolerance, self.drop_ignored, self.max_logits_bytes, self.reduction
        )
        return _compute(
            input,
            linear_weight,
            target,
            self.emphasis,
            self.emphasis_params,
            linear_bias,
            self.weight,
            self.sample_weight if sample_weight is None else sample_weight,
            self.ignore_index,
            self.reduction,
            normalizer,
            self.eps,
            self.softcap,
            self.logit_scale,
            self.recompute,
            self.skip_tolerance,
            self.drop_ignored,
            self.max_logits_bytes,
            self.return_output,
            self.impl,
        )
