"""The mathematics of the catalogue in torch, one for one with kernels/fused_dm_kernels/densities.py.

Each function takes log p, log q (q = 1 - p) and the family's parameters. Written so that nothing cancels or overflows near
p = 0 and p = 1; the derivations are in kernels/README.md. A log_weight gets log p and log q of at least -1e30, a loss may get
-inf.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LN2 = math.log(2.0)
# exp(-80) is a normal number in fp32, and below the rounding of 1 in fp64 by far.
_NEGLIGIBLE = -80.0
# The largest t of a Taylor cross entropy: its sum has that many terms at once, in torch.
TAYLOR_TERMS = 64


class Family(NamedTuple):
    """The mathematics of an EDF in torch: functions of (log_p, log_q, *parameters) on tensors of any shape.

    `log_weight` gives the natural log of w. `loss` gives the closed form f of the loss whose gradient has the norm w, or
    is None where there is none. A parameter is a float or a 0-d tensor.
    """

    log_weight: Callable[..., Tensor]
    loss: Callable[..., Tensor] | None


def log(value: Any) -> Any:
    """log of a parameter, a float or a 0-d tensor; -inf for 0."""
    if isinstance(value, Tensor):
        return value.log()
    return math.log(value) if value > 0 else -math.inf


def log_complement(value: Any) -> Any:
    """log(1 - value) of a parameter, a float or a 0-d tensor, with all digits near 0; -inf for 1."""
    if isinstance(value, Tensor):
        return torch.log1p(-value)
    return math.log1p(-value) if value < 1 else -math.inf


def _log1p(value: Any) -> Any:
    return torch.log1p(value) if isinstance(value, Tensor) else math.log1p(value)


def _log_sum(x: Any, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y))."""
    return torch.logaddexp(y.new_full((), x) if not isinstance(x, Tensor) else x.to(y.dtype), y)


def _softplus(x: Tensor) -> Tensor:
    # torch's own is x from 20 on, which is off by 1e-10 there.
    return -F.logsigmoid(-x)


def _finite(x: Tensor) -> Tensor:
    return x.clamp(min=-1e30)


def _dm_log_weight(log_p: Tensor, log_q: Tensor, beta, lambd) -> Tensor:
    return beta * torch.exp(lambd * log_p + log_q)


def _normal_log_weight(log_p: Tensor, log_q: Tensor, psi, beta) -> Tensor:
    # 2 psi - p from the smaller of p and q, whose digits are all there.
    rest = torch.where(log_p < log_q, 2 * psi - torch.exp(log_p), (2 * psi - 1) + torch.exp(log_q))
    return beta * torch.exp(log_p) * rest


def _beta_log_weight(log_p: Tensor, log_q: Tensor, alpha, eta) -> Tensor:
    return (alpha - 1) * log_p + (eta - 1) * log_q


def _cce_log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _LN2 + log_q


def _cce_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -log_p


def _mae_log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _LN2 + log_p + log_q


def _mae_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.exp(log_q)


def _dft_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p = _finite(log_p)
    return -torch.exp(log_p) * log_p


def _mse_log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 2 * _LN2 + log_p + 2 * log_q


def _mse_loss(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.exp(2 * log_q)


def _gce_log_weight(log_p: Tensor, log_q: Tensor, q) -> Tensor:
    return _LN2 + q * log_p + log_q


def _gce_loss(log_p: Tensor, log_q: Tensor, q) -> Tensor:
    return -torch.expm1(q * log_p) / q


def _truncated_gce_log_weight(log_p: Tensor, log_q: Tensor, q, k) -> Tensor:
    return torch.where(log_p > log(k), _gce_log_weight(log_p, log_q, q), torch.full_like(log_p, -math.inf))


def _truncated_gce_loss(log_p: Tensor, log_q: Tensor, q, k) -> Tensor:
    return _gce_loss(log_p.clamp(min=log(k)), log_q, q)


def _focal_log_weight(log_p: Tensor, log_q: Tensor, gamma) -> Tensor:
    # q - gamma p log p = q (1 + gamma share): share = -p log p / q goes from 0 to 1.
    certain = log_q < _NEGLIGIBLE
    share = torch.exp(log_p) * -log_p / torch.exp(torch.where(certain, torch.zeros_like(log_q), log_q))
    share = torch.where(certain, torch.ones_like(share), share)
    return _LN2 + (gamma + 1) * log_q + torch.log1p(gamma * share)


def _focal_loss(log_p: Tensor, log_q: Tensor, gamma) -> Tensor:
    return torch.exp(gamma * _finite(log_q)) * -log_p


def _sce_log_weight(log_p: Tensor, log_q: Tensor, alpha, beta, A) -> Tensor:
    return _LN2 + log_q + _log_sum(log(alpha), log(beta * A) + log_p)


def _sce_loss(log_p: Tensor, log_q: Tensor, alpha, beta, A) -> Tensor:
    # A multiple of 0 of an infinite -log p is 0.
    cross_entropy = torch.where(torch.zeros_like(log_p) + alpha == 0, torch.zeros_like(log_p), -log_p)
    return alpha * cross_entropy + beta * A * torch.exp(log_q)


def _taylorce_log_weight(log_p: Tensor, log_q: Tensor, t) -> Tensor:
    # 1 - q^t = p terms: terms = 1 + q + ... + q^(t-1) goes from t to 1.
    hopeless = log_p < _NEGLIGIBLE
    terms = -torch.expm1(t * log_q) / torch.exp(torch.where(hopeless, torch.zeros_like(log_p), log_p))
    terms = torch.where(hopeless, torch.zeros_like(terms) + t, terms)
    return _LN2 + log_p + log_q + torch.log(terms)


def _taylorce_loss(log_p: Tensor, log_q: Tensor, t) -> Tensor:
    order = torch.arange(1, TAYLOR_TERMS + 1, dtype=log_q.dtype, device=log_q.device)
    terms = torch.exp(log_q.unsqueeze(-1) * order) / order
    return torch.where(order <= t, terms, torch.zeros_like(terms)).sum(-1)


def _poly1_log_weight(log_p: Tensor, log_q: Tensor, eps) -> Tensor:
    # 1 + eps p; for eps < 0 as (1 + eps) - eps q, which has no difference.
    tensor = isinstance(eps, Tensor)
    below, above = (eps.clamp(max=0), eps.clamp(min=0)) if tensor else (min(eps, 0.0), max(eps, 0.0))
    return _LN2 + log_q + _log_sum(log(1 + below), log(-below) + log_q) + torch.log1p(above * torch.exp(log_p))


def _poly1_loss(log_p: Tensor, log_q: Tensor, eps) -> Tensor:
    q = torch.exp(log_q)
    # Where eps < 0 and q is small, as -(1 + eps) log p - eps (-log p - q), whose bracket is q^2 / 2 + q^3 / 3 + ...
    small = (q <= 0.5) & (q.new_zeros(()) + eps < 0)
    few = torch.where(small, q, torch.zeros_like(q))
    return torch.where(small, (1 + eps) * torch.where(small, -log_p, few) - eps * _log_excess(few), -log_p + eps * q)


def _log_excess(q: Tensor) -> Tensor:
    """-log(1 - q) - q for 0 <= q <= 1/2: with s = q / (2 - q), 2 artanh(s) - q = s q + 2 (s^3 / 3 + s^5 / 5 + ...)."""
    s = q / (2 - q)
    series = torch.zeros_like(s)
    for k in range(17, 0, -1):
        series = (series + 1 / (2 * k + 1)) * s * s
    return s * q + 2 * s * series


def _phuberce_log_weight(log_p: Tensor, log_q: Tensor, tau) -> Tensor:
    return _LN2 + log_q + (log(tau) + log_p).clamp(max=0)


def _phuberce_loss(log_p: Tensor, log_q: Tensor, tau) -> Tensor:
    # 1 - tau p where p is below 1 / tau, from its logarithm.
    relative = log(tau) + log_p
    return torch.where(relative <= 0, log(tau) - torch.expm1(relative.clamp(max=0)), -log_p)


def _aul_log_weight(log_p: Tensor, log_q: Tensor, a, q) -> Tensor:
    # a - p = (a - 1) + q, and q / (a - p) = 1 / (1 + (a - 1) / q), of which the logarithm does not cancel where a is near 1
    log_over = log(a - 1)
    return _LN2 + log_p + q * _log_sum(log_over, log_q) - _softplus(log_over - log_q)


def _aul_loss(log_p: Tensor, log_q: Tensor, a, q) -> Tensor:
    log_q = _finite(log_q)
    return torch.exp(q * _log_sum(log(a - 1), log_q)) * -torch.expm1(-q * _softplus(log_q - log(a - 1))) / q


def _agce_log_weight(log_p: Tensor, log_q: Tensor, a, q) -> Tensor:
    # p / (a + p) = 1 / (1 + a / p)
    return _LN2 + log_q + q * _log_sum(log(a), log_p) - _softplus(log(a) - log_p)


def _agce_loss(log_p: Tensor, log_q: Tensor, a, q) -> Tensor:
    # log((a + p) / (a + 1)) = log(1 - rest)
    rest = torch.exp(log_q) / (a + 1)
    ratio = torch.where(rest <= 0.5, torch.log1p(-rest.clamp(max=0.5)), _log_sum(log(a), log_p) - _log1p(a))
    return torch.exp(q * _log1p(a) + torch.zeros_like(ratio)) * -torch.expm1(q * ratio) / q


def _ael_log_weight(log_p: Tensor, log_q: Tensor, a) -> Tensor:
    return _LN2 - log(a) + log_p + log_q - torch.exp(log_p) / a


def _ael_loss(log_p: Tensor, log_q: Tensor, a) -> Tensor:
    return torch.exp(-torch.exp(log_p) / a)


def _js_log_weight(log_p: Tensor, log_q: Tensor, pi) -> Tensor:
    log_rest = _log1p(-pi)
    return _LN2 - log(-log_rest) + log_p + log_q + torch.log(_softplus(log(pi) - log_rest - log_p))


def _js_loss(log_p: Tensor, log_q: Tensor, pi) -> Tensor:
    # With m = pi + (1 - pi) p: f Z = -pi log m - (1 - pi) q log(1 - pi) - (1 - pi) p log(m / p), none larger than about f Z.
    log_p, log_q = _finite(log_p), _finite(log_q)
    p, q, rest, log_rest = torch.exp(log_p), torch.exp(log_q), 1 - pi, _log1p(-pi)
    log_m = torch.where(rest * q <= 0.5, torch.log1p(-(rest * q).clamp(max=0.5)), torch.log(pi + rest * p))
    divergence = -pi * log_m - rest * (q * log_rest + p * _softplus(log(pi) + log_q - log_p))
    return divergence / (-rest * log_rest)


def _self_paced_log_weight(log_p: Tensor, log_q: Tensor, threshold) -> Tensor:
    return torch.where(-log_p < threshold, _LN2 + log_q, torch.full_like(log_q, -math.inf))


def _self_paced_loss(log_p: Tensor, log_q: Tensor, threshold) -> Tensor:
    return (-log_p).clamp(max=threshold)


def _self_paced_linear_log_weight(log_p: Tensor, log_q: Tensor, threshold) -> Tensor:
    return _LN2 + log_q + torch.log((1 + log_p / threshold).clamp(min=0))


def _self_paced_linear_loss(log_p: Tensor, log_q: Tensor, threshold) -> Tensor:
    log_p = _finite(log_p)
    return (1 + log_p / threshold).clamp(min=0) * -log_p


FAMILIES: dict[str, Family] = {
    "dm": Family(_dm_log_weight, None),
    "normal": Family(_normal_log_weight, None),
    "beta": Family(_beta_log_weight, None),
    "cce": Family(_cce_log_weight, _cce_loss),
    "mae": Family(_mae_log_weight, _mae_loss),
    "dft": Family(_mae_log_weight, _dft_loss),
    "mse": Family(_mse_log_weight, _mse_loss),
    "gce": Family(_gce_log_weight, _gce_loss),
    "truncated_gce": Family(_truncated_gce_log_weight, _truncated_gce_loss),
    "focal": Family(_focal_log_weight, _focal_loss),
    "sce": Family(_sce_log_weight, _sce_loss),
    "taylorce": Family(_taylorce_log_weight, _taylorce_loss),
    "poly1": Family(_poly1_log_weight, _poly1_loss),
    "phuberce": Family(_phuberce_log_weight, _phuberce_loss),
    "aul": Family(_aul_log_weight, _aul_loss),
    "agce": Family(_agce_log_weight, _agce_loss),
    "ael": Family(_ael_log_weight, _ael_loss),
    "js": Family(_js_log_weight, _js_loss),
    "self_paced": Family(_self_paced_log_weight, _self_paced_loss),
    "self_paced_linear": Family(_self_paced_linear_log_weight, _self_paced_linear_loss),
}
# Those that are here; others may be registered.
CATALOGUE = frozenset(FAMILIES)
