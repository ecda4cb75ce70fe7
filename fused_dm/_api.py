"""The public functions over logits: `dm_loss`, `DMLoss` and `margin`."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _cpu, _operators, _validation, edf, reference
from ._loss import Emphasis, Problem, Received, margin_loss, needs_gradient, triton_loss


class DMOutput(NamedTuple):
    """What `dm_loss` returns with `return_output=True`. All but `loss` are detached; ignored rows have 0, nan and False.

    Attributes:
        loss: the reduced loss, 0-d, or shaped like `target` for `reduction="none"`; fp32 (fp64 for fp64 logits).
        example_weight: c w / D, shaped like `target`: the L1 norm of the row's gradient at eps = 0, with the sign of c.
        target_prob: p, shaped like `target`.
        sum_weight: 1e-8 + sum of c w, 0-d fp64.
        correct: whether the label's logit is at or above every other, shaped like `target`, bool.
    """

    loss: Tensor
    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor


# The settings of numbers used last, on their devices; and all those that a CUDA graph has recorded, which it reads again.
SETTINGS = 256
_PARAMS: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}
_CAPTURED: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _traced(values: tuple[float, ...], device: torch.device) -> Tensor:
    # A float in traced code recompiles for every value, unless all it meets is a product with a tensor.
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one * value for value in values])


def _params(values: tuple[float, ...], device: torch.device) -> Tensor:
    """eps and the family's parameters on the device, fp64.

    Kept, as a copy to a GPU would synchronise; but not where a tracer or a transform makes it a tensor of its own.
    """
    if torch.compiler.is_compiling():
        return _traced(values, device)
    params = _PARAMS.pop((values, device), None)
    if params is None:
        with torch.inference_mode(False):
            params = torch.tensor(values, dtype=torch.float64, device=device)
        if type(params) is not Tensor or torch._is_functional_tensor(params):
            return params
        if len(_PARAMS) >= SETTINGS:
            # All at once, as another thread may change them meanwhile.
            oldest, *_ = _PARAMS
            _PARAMS.pop(oldest, None)
    # At the end, where the last used are.
    _PARAMS[values, device] = params
    if _validation.is_captured(device):
        _CAPTURED[values, device] = params
    return params


def _normalizer(value: float | Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.double()
    return (
        _traced((value,), device)[0]
        if torch.compiler.is_compiling()
        else torch.full((), float(value), dtype=torch.float64, device=device)
    )


def _transform(softcap: float | Tensor | None, logit_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    """The scale and, where there is a softcap, that, fp64 on the device; None where the logits stay as they are."""
    if softcap is None and logit_scale is None:
        return None
    values = (1.0 if logit_scale is None else logit_scale,) + (() if softcap is None else (softcap,))
    if not any(isinstance(value, Tensor) for value in values):
        return _params(tuple(float(value) for value in values), device)
    return torch.stack([v.double() if isinstance(v, Tensor) else _params((float(v),), device)[0] for v in values])


def _default_eps(emphasis: Any, eps: float | None) -> float:
    if eps is not None:
        return float(eps)
    return 0.0 if isinstance(emphasis, edf.EDF) and emphasis.has_loss else 1e-6


def _custom(log_weight: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(log_p: Tensor, log_q: Tensor, *params: Tensor) -> Tensor:
        value = log_weight(log_p, log_q, *params)
        if not isinstance(value, Tensor) or value.shape != log_p.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"emphasis: expected log_weight to return a tensor of shape {tuple(log_p.shape)}, got {got}")
        if not value.is_floating_point():
            raise ValueError(f"emphasis: expected log_weight to return a float tensor, got {value.dtype}")
        return value.to(log_p.dtype)

    return checked


def _emphasis(emphasis: edf.EDF | Callable, params: Tensor) -> Emphasis:
    if isinstance(emphasis, edf.EDF):
        log_weight, loss = emphasis.forms
        if emphasis.structure is None:
            log_weight = _custom(log_weight)
        return Emphasis(emphasis.family if emphasis.fused else None, params, log_weight, loss)
    return Emphasis(None, params, _custom(emphasis), None)


class _Bound(NamedTuple):
    """What the reference takes in the place of an EDF, with parameters of a tensor."""

    log_weight: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] | None
    has_loss: bool


def _bound(emphasis: edf.EDF | Callable, params: Tensor | None) -> _Bound | Callable:
    if not isinstance(emphasis, edf.EDF):
        return _custom(emphasis)
    values = emphasis.params if params is None else params.unbind()[1:]
    log_weight, loss = emphasis.forms
    if emphasis.structure is None:
        log_weight = _custom(log_weight)
    return _Bound(
        lambda log_p, log_q: log_weight(log_p, log_q, *values),
        None if loss is None else lambda log_p, log_q: loss(log_p, log_q, *values),
        loss is not None,
    )


def _rows_of(logits: Tensor, impl: str) -> Tensor:
    """(N, V), or (N, V, d1 * ... * dk) where the implementation reads that in place.

    The kernels do; the CPU implementation does where the classes are not the innermost. A view, but where the spatial
    dimensions are no single one in memory, and for the reference where the classes are not the innermost.
    """
    if logits.dim() == 1:
        return logits.unsqueeze(0)
    if logits.dim() == 2:
        return logits
    if impl == "triton":
        return logits.flatten(2)
    rows = logits.movedim(1, -1)
    if impl == "cpu" and not _validation.is_contiguous(rows):
        return logits.flatten(2)
    return rows.reshape(-1, logits.shape[1])


def _calm(impl: str) -> contextlib.AbstractContextManager:
    """Torch calls of the CPU implementation start no threads; traced ones become loops of their own."""
    return _cpu.calm() if impl == "cpu" and not torch.compiler.is_compiling() else contextlib.nullcontext()


def _labels_of(target: Tensor, impl: str) -> Tensor:
    """The labels (N,) in 64 bits: in a narrower dtype a comparison with ignore_index or with V would wrap around."""
    # Mostly there is nothing to do; in traced code the number of labels may be unknown.
    if not torch.compiler.is_compiling() and target.dtype == torch.int64 and target.is_contiguous():
        return target.reshape(-1)
    with _calm(impl):
        return target.reshape(-1).long()


def _compute(
    logits: Tensor,
    target: Tensor,
    emphasis: edf.EDF | Callable,
    params: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    eps: float,
    softcap: float | Tensor | None,
    logit_scale: float | Tensor | None,
    inplace: bool,
    return_output: bool,
    impl: str | None,
) -> Tensor | DMOutput:
    _validation.check_logits_and_target(logits, target, ignore_index)
    _validation.check_weights(logits, target, weight, sample_weight)
    for name, value in (("normalizer", normalizer), ("softcap", softcap), ("logit_scale", logit_scale)):
        _validation.check_scalar_device(name, value, "logits", logits)
    impl = _validation.choose_impl(impl, logits)
    _validation.check_transforms(impl, logits, weight, sample_weight, normalizer, softcap, logit_scale)
    _validation.check_inplace(inplace, logits, impl)
    labels = _labels_of(target, impl)
    row_weight = None if sample_weight is None else sample_weight.reshape(-1)
    inplace = inplace and needs_gradient(logits)
    if _validation.validates_labels(first=inplace and impl == "cpu"):
        with _calm(impl):
            _validation.check_labels(labels, logits.shape[min(1, logits.dim() - 1)], ignore_index)
    rows = _rows_of(logits, impl)
    divisor = _normalizer(normalizer, logits.device)
    if params is not None and params.device != logits.device:
        params = None
    if impl == "reference":
        loss, *rest = reference.dm_loss(
            rows,
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
        received: Received | None = Received(*rest)
    else:
        if params is None:
            values = emphasis.params if isinstance(emphasis, edf.EDF) else ()
            params = _params((eps, *values), logits.device)
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
            inplace=inplace,
            transform=_transform(softcap, logit_scale, logits.device),
        )
        fused = impl == "triton" and problem.emphasis.family is not None
        with _calm(impl):
            loss, received = triton_loss(problem) if fused else margin_loss(problem, impl)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    if received is None or not return_output:
        return loss
    return DMOutput(
        loss=loss,
        example_weight=received.example_weight.reshape(target.shape),
        target_prob=received.target_prob.reshape(target.shape),
        sum_weight=received.sum_weight,
        correct=received.correct.reshape(target.shape),
    )


@overload
def dm_loss(
    logits: Tensor,
    target: Tensor,
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
    inplace: bool = False,
    return_output: Literal[False] = False,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor: ...


@overload
def dm_loss(
    logits: Tensor,
    target: Tensor,
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
    inplace: bool = False,
    return_output: Literal[True],
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> DMOutput: ...


@overload
def dm_loss(
    logits: Tensor,
    target: Tensor,
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
    inplace: bool = False,
    return_output: bool,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor | DMOutput: ...


def dm_loss(
    logits: Tensor,
    target: Tensor,
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
    inplace: bool = False,
    return_output: bool = False,
    label_smoothing: float = 0.0,
    impl: str | None = None,
) -> Tensor | DMOutput:
    """Softmax loss whose gradient is designed: the direction of cross entropy, with the magnitude w(p) of an EDF.

    With p the label's softmax probability, q = 1 - p, c the row's weight (`weight[target] * sample_weight`):

        value        sum_i c_i r(p_i) / D          r = f(p) where the EDF has a closed form, else -w(p) log p
        gradient     c_i w(p_i) / (2 q_i + eps) (softmax(z_i) - onehot(y_i)) / D

    The gradient is *defined* by the second line; w, c and D are constants in it, and it is not the derivative of the value
    unless the EDF has a closed form and D does not depend on the logits. It equals that of this eager code (but for
    rounding, which the implementations keep small where this code does not)::

        p = logits.softmax(1).gather(1, target[:, None])[:, 0]
        w = emphasis.weight(p).detach()
        norm = (2 * (1 - p) + eps).detach()
        loss = (w / norm * F.cross_entropy(logits, target, reduction="none")).sum() / w.sum()

    Args:
        logits: (V), (N, V) or (N, V, d1, ..., dk); fp16, bf16, fp32 or fp64. Statistics are fp32 (fp64 for fp64). Never
            changed unless `inplace`. On a GPU the gradient lies as they do, but rows with room between them, as those of a
            slice of the classes, have less than 16 bytes of room in it; on a CPU it may lie otherwise than transposed logits.
        target: (), (N) or (N, d1, ..., dk), any integer dtype; labels in [0, V) or `ignore_index`.
        emphasis: an EDF, its name such as "dm:beta=8,lambd=0.5", or any callable log_weight(log_p, log_q) that returns log w.
            It gets (N,) tensors, fp32 (fp64 for fp64 logits), at least -1e30, and no gradient flows through it.
        weight: (V,) class weights; may be zero or negative. Rounded to fp32 for logits that are not fp64.
        sample_weight: weights shaped like `target`; likewise.
        ignore_index: rows with this label have zero gradient and are in neither the value nor D.
        reduction: "sum_weight": D = 1e-8 + sum c w. "mean": D = sum of c over the rows that are not ignored. "sum": D =
            `normalizer`, or 1. "none": the rows, with D = 1. Under "sum_weight" no w overflows (with weights of both signs D
            may cancel, though); under the others the gradient overflows where log (c w / D) is above 88 (for fp64 logits,
            where that or log (c w) is above 709). The value overflows where c f(p), before it is divided, does. CCE, MAE and
            GCE are the published losses under "mean".
        normalizer: D for `reduction="sum"`: a number above 0 or a 0-d tensor, which may be 0 where every row is ignored. For
            gradient accumulation and data parallel training. On a GPU a known D lets one kernel do everything, so divide here
            rather than afterwards.
        eps: added to 2 q, at least 0. None means 0 for an EDF with a closed form and 1e-6, the original layer's value, for
            the others. With 0 a fitted row keeps a gradient of norm w(1) / D.
        softcap: c in c tanh(z / c), by which the logits are replaced; a number above 0 or a 0-d tensor. None for none.
        logit_scale: s in s z, likewise, before the softcap. Both happen where the logits are loaded, and the gradient has their
            derivative, s (1 - tanh^2(s z / c)).
        inplace: let the gradient overwrite the logits, in the forward or the backward pass, so that it takes no memory of its
            own. Then use the logits no more: what is needed of them is in `return_output=True`. A backward pass through a
            later use is an error (but in compiled code, which cannot be told), as is one through an earlier operation that
            kept them, such as a tanh that made them; a plain read (`logits.argmax(1)`) cannot be noticed, and finds
            gradients. Nothing is overwritten where no gradient is wanted. The logits must have been computed: not a leaf
            tensor or a view of one, not expanded or overlapping; on a CPU with classes adjacent in memory, elsewhere with
            spatial dimensions that are one in memory, as those of a whole image are.
        return_output: return DMOutput, with what each example received, instead of the loss alone.
        label_smoothing: must be 0; accepted for the sake of `cross_entropy`'s signature.
        impl: None for Triton kernels on a GPU tensor, the CPU implementation on a CPU tensor, and eager torch elsewhere;
            "triton", "cpu" or "reference" to force one. Only "reference" supports torch.func.

    Returns:
        The loss, fp32 (fp64 for fp64 logits), 0-d or shaped like `target` for "none"; or DMOutput. With every row ignored
        the value and the gradient are 0. A row with nan or +inf among its logits, or with -inf alone, has a value and a
        gradient of nan; one with its label at -inf has the value inf, unless f is finite there or w is 0, that is, below
        2^-1022.

    Raises:
        TypeError: an argument of the wrong type or dtype, probability targets among them.
        ValueError: a wrong shape, device, reduction or parameter, `label_smoothing` other than 0, logits that `inplace`
            cannot overwrite.
        IndexError: a label that is no class, on the CPU or under FUSED_DM_VALIDATE=1. On a GPU, where looking would
            synchronise, the row's value is nan.

    Example:
        >>> import torch
        >>> from fused_dm import dm_loss, edf
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]], requires_grad=True)
        >>> loss = dm_loss(logits, torch.tensor([0, 1]), edf.DM(beta=8, lambd=0.5))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.3811

    Reference: Wang et al., Derivative Manipulation for General Example Weighting, arXiv 1905.11233.
    """
    _validation.check_options(reduction, normalizer, eps, label_smoothing)
    _validation.check_transform(softcap, logit_scale)
    density = _validation.check_emphasis(emphasis)
    return _compute(
        logits,
        target,
        density,
        None,
        weight,
        sample_weight,
        ignore_index,
        reduction,
        normalizer,
        _default_eps(density, eps),
        softcap,
        logit_scale,
        inplace,
        return_output,
        impl,
    )


class DMLoss(torch.nn.Module):
    """`dm_loss` as a module, in the place of `torch.nn.CrossEntropyLoss`.

    The EDF's parameters are held in an fp64 buffer that the computation reads, so that `set_emphasis` changes them without
    recompiling a compiled model, and reaches a captured CUDA graph. The buffer stays fp64 when the module is cast;
    it is not in the `state_dict`, but what a schedule of `fused_dm.schedules` has made of it is.

    Args:
        emphasis: see `dm_loss`.
        weight, sample_weight, ignore_index, reduction, normalizer, eps, softcap, logit_scale, inplace, return_output,
            label_smoothing, impl: see `dm_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, here or when called; see `dm_loss`.

    Example:
        >>> import torch
        >>> from fused_dm import DMLoss, edf
        >>> criterion = DMLoss("dm:beta=2,lambd=0.5")
        >>> criterion.set_emphasis(edf.DM(beta=8, lambd=0.5))
        >>> criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4)).backward()

    Reference: arXiv 1905.11233.
    """

    emphasis_params: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None

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
        inplace: bool = False,
        return_output: bool = False,
        label_smoothing: float = 0.0,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        _validation.check_eps(eps)
        self._emphasis = _validation.check_emphasis(emphasis)
        self._eps = _default_eps(self.emphasis, eps)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace = inplace
        self.return_output = return_output
        self.label_smoothing = label_smoothing
        self.impl = impl
        self.normalizer = normalizer
        values = self.emphasis.params if isinstance(self.emphasis, edf.EDF) else ()
        self.register_buffer("emphasis_params", torch.tensor((self.eps, *values), dtype=torch.float64), persistent=False)
        _validation.check_tensor_or_none("weight", weight)
        _validation.check_tensor_or_none("sample_weight", sample_weight)
        self.register_buffer("weight", weight)
        self.register_buffer("sample_weight", sample_weight)
        self._check(normalizer)

    def _check(self, normalizer: float | Tensor | None) -> None:
        """Whether the settings, which may have been assigned since, are possible."""
        _validation.check_options(self.reduction, normalizer, self.eps, self.label_smoothing)
        _validation.check_transform(self.softcap, self.logit_scale)
        _validation.check_impl(self.impl)
        _validation.check_ignore_index(self.ignore_index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DMLoss":
        params = self.emphasis_params
        super()._apply(fn, recurse)
        device = self.emphasis_params.device
        if self.emphasis_params is not params and device.type != "meta":
            # Another dtype would round them, and `to_empty` leaves what there was in memory.
            values = self.emphasis.params if isinstance(self.emphasis, edf.EDF) else ()
            self.emphasis_params = torch.tensor((self.eps, *values), dtype=torch.float64, device=device)
        return self

    def extra_repr(self) -> str:
        shown = f"{self.emphasis}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, eps={self.eps}"
        usual = {
            "normalizer": None,
            "softcap": None,
            "logit_scale": None,
            "inplace": False,
            "return_output": False,
            "impl": None,
        }
        return shown + self._repr_of(usual)

    def _repr_of(self, usual: dict[str, Any]) -> str:
        """The settings that are not as usual."""
        return "".join(f", {name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value)

    @property
    def emphasis(self) -> edf.EDF | Callable[[Tensor, Tensor], Tensor]:
        """The EDF; to assign one is `set_emphasis`."""
        return self._emphasis

    @emphasis.setter
    def emphasis(self, emphasis: edf.EDF | str) -> None:
        self.set_emphasis(emphasis)

    @property
    def eps(self) -> float:
        """What is added to 2 q; see `dm_loss`. It may be assigned, as a number or None, and is in the buffer then."""
        return self._eps

    @eps.setter
    @torch.no_grad()
    def eps(self, eps: float | None) -> None:
        _validation.check_eps(eps)
        self._eps = _default_eps(self.emphasis, eps)
        self.emphasis_params[0].fill_(self._eps)

    @torch.no_grad()
    def set_emphasis(self, emphasis: edf.EDF | str) -> None:
        """Change the EDF's parameters in place.

        Args:
            emphasis: an EDF of the same family as the present one, or its name.

        Raises:
            ValueError: the family is another one; make a new DMLoss for that.
        """
        density = _validation.check_emphasis(emphasis)
        if not (isinstance(density, edf.EDF) and isinstance(self.emphasis, edf.EDF)):
            raise ValueError("set_emphasis: expected a built-in EDF here and at construction, got a callable")
        structure = self.emphasis.structure
        if structure is None or density.structure is None:
            raise ValueError(
                "set_emphasis: expected EDFs whose numbers alone differ, here and at construction, got a subclass with a "
                f"log_weight or loss of its own: {density if density.structure is None else self.emphasis}"
            )
        if density.structure != structure:
            raise ValueError(f"set_emphasis: expected an EDF of the family {structure!r}, got {density}")
        self._emphasis = density
        # A copy from the host would wait for the GPU; a fill does not.
        for slot, value in zip(self.emphasis_params.unbind(), (self.eps, *density.params), strict=True):
            slot.fill_(value)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | DMOutput:
        """The loss; see `dm_loss`. `sample_weight` and `normalizer`, if given, replace those of the module."""
        normalizer = self.normalizer if normalizer is None else normalizer
        self._check(normalizer)
        return _compute(
            logits,
            target,
            self.emphasis,
            self.emphasis_params,
            self.weight,
            self.sample_weight if sample_weight is None else sample_weight,
            self.ignore_index,
            self.reduction,
            normalizer,
            self.eps,
            self.softcap,
            self.logit_scale,
            self.inplace,
            self.return_output,
            self.impl,
        )


def margin(logits: Tensor, target: Tensor, *, ignore_index: int = -100, impl: str | None = None) -> Tensor:
    """The label's logit minus the logsumexp of all others: z_y - log sum_{j != y} exp(z_j), differentiable.

    Every function of the label's probability is a function of this one number, p = sigmoid(margin), -log p =
    softplus(-margin), and it loses no digits near p = 0 and p = 1. The logits are read once in the forward pass, and read
    and written once in the backward pass, where d margin / d z_y = 1 and d margin / d z_j = -exp(z_j - lse) for the others.
    The gradient equals that of::

        others = logits.scatter(1, target[:, None], -math.inf)
        logits.gather(1, target[:, None])[:, 0] - others.logsumexp(1)

    Args:
        logits: (V), (N, V) or (N, V, d1, ..., dk); fp16, bf16, fp32 or fp64.
        target: (), (N) or (N, d1, ..., dk), any integer dtype; labels in [0, V) or `ignore_index`.
        ignore_index: rows with this label have the margin nan and zero gradient.
        impl: see `dm_loss`.

    Returns:
        The margins, shaped like `target`; fp32 (fp64 for fp64 logits). +inf, with zero gradient, where no other class has a
        finite logit.

    Raises:
        TypeError, ValueError, IndexError: as `dm_loss`.

    Example:
        >>> import torch
        >>> from fused_dm import margin
        >>> logits = torch.randn(4, 10, requires_grad=True)
        >>> cross_entropy = torch.nn.functional.softplus(-margin(logits, torch.arange(4))).mean()
        >>> cross_entropy.backward()
    """
    _validation.check_logits_and_target(logits, target, ignore_index)
    impl = _validation.choose_impl(impl, logits)
    _validation.check_transforms(impl, logits)
    rows, labels = _rows_of(logits, impl), _labels_of(target, impl)
    with _calm(impl):
        if _validation.validates_labels():
            _validation.check_labels(labels, rows.shape[1], ignore_index)
        if impl == "reference":
            margins = reference.margin(rows, labels, ignore_index)
        else:
            margins = _operators.margin(rows, labels, ignore_index, impl)[0]
    return margins.reshape(target.shape)


def available_impls() -> tuple[str, ...]:
    """The implementations that can be forced by `impl` on this machine, for tensors on a device that suits them."""
    gpu = any(getattr(torch, device).is_available() for device in _validation.TRITON_DEVICES)
    triton = _validation.has_triton() and (gpu or _validation.interprets())
    return ("triton", "cpu", "reference") if triton else ("cpu", "reference")
