"""Emphasis density functions on the device.

A family is a pair of `@triton.jit` functions of `(log_p, log_q, params_ptr)`: the natural log of w, and the closed
form f of the loss whose gradient has that weight, or None where there is none. `params_ptr` points to the family's
parameters in fp64; each is loaded once a program. log p and log q are at least -1e30 for a weight. For a loss they may be
-inf, or nan, which must reach the value: `tl.maximum` and `tl.minimum` would drop it.
"""

import triton
import triton.language as tl

from .numerics import INF, LN2, exp, expm1_negative, log1p_unit, log_1m, log_excess, log_nonnegative, log_sum, softplus

# exp(-80) is a normal number in fp32, and below the rounding of 1 in fp64 by far.
NEGLIGIBLE = tl.constexpr(-80.0)


@triton.jit
def param(params_ptr, index: tl.constexpr, like):
    """A parameter of the family in the dtype of `like`."""
    return tl.load(params_ptr + index).to(like.dtype)


@triton.jit
def log_param(params_ptr, index: tl.constexpr, like):
    """The log of a positive parameter in the dtype of `like`, with its digits where the parameter is near 1."""
    over = (tl.load(params_ptr + index) - 1.0).to(like.dtype)
    value = param(params_ptr, index, like)
    size = tl.where(over < 0.0, -over / value, over)
    near = size <= 1.0
    log1p = log1p_unit(tl.where(near, size, 0.0))
    return tl.where(near, tl.where(over < 0.0, -log1p, log1p), tl.log(value))


@triton.jit
def finite(x):
    """A logarithm with -1e30 for -inf, so that 0 times it is 0."""
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def dm_log_weight(log_p, log_q, params_ptr):
    """w = exp(beta p^lambd q)."""
    beta = param(params_ptr, 0, log_p)
    lambd = param(params_ptr, 1, log_p)
    return beta * exp(lambd * log_p + log_q)


@triton.jit
def normal_log_weight(log_p, log_q, params_ptr):
    """w = exp(-beta p (p - 2 psi))."""
    psi = param(params_ptr, 0, log_p)
    beta = param(params_ptr, 1, log_p)
    # 2 psi - p from the smaller of p and q, whose digits are all there.
    rest = tl.where(log_p < log_q, 2.0 * psi - exp(log_p), (2.0 * psi - 1.0) + exp(log_q))
    return beta * exp(log_p) * rest


@triton.jit
def beta_log_weight(log_p, log_q, params_ptr):
    """w = p^(alpha - 1) q^(eta - 1)."""
    alpha_1 = (tl.load(params_ptr) - 1.0).to(log_p.dtype)
    eta_1 = (tl.load(params_ptr + 1) - 1.0).to(log_p.dtype)
    return alpha_1 * log_p + eta_1 * log_q


@triton.jit
def cce_log_weight(log_p, log_q, params_ptr):
    """w = 2 q."""
    return LN2 + log_q


@triton.jit
def cce_loss(log_p, log_q, params_ptr):
    """f = -log p."""
    return -log_p


@triton.jit
def mae_log_weight(log_p, log_q, params_ptr):
    """w = 2 p q."""
    return LN2 + log_p + log_q


@triton.jit
def mae_loss(log_p, log_q, params_ptr):
    """f = 1 - p."""
    return exp(log_q)


@triton.jit
def dft_loss(log_p, log_q, params_ptr):
    """Reported: -p log p."""
    log_p = finite(log_p)
    return -exp(log_p) * log_p


@triton.jit
def mse_log_weight(log_p, log_q, params_ptr):
    """w = 4 p q^2."""
    return 2.0 * LN2 + log_p + 2.0 * log_q


@triton.jit
def mse_loss(log_p, log_q, params_ptr):
    """f = q^2."""
    return exp(2.0 * log_q)


@triton.jit
def gce_log_weight(log_p, log_q, params_ptr):
    """w = 2 p^q (1 - p)."""
    return LN2 + param(params_ptr, 0, log_p) * log_p + log_q


@triton.jit
def gce_loss(log_p, log_q, params_ptr):
    """f = (1 - p^q) / q."""
    power = param(params_ptr, 0, log_p)
    return -expm1_negative(power * log_p) / power


@triton.jit
def truncated_gce_log_weight(log_p, log_q, params_ptr):
    """w = 2 p^q (1 - p) where p > k."""
    inside = log_p > log_param(params_ptr, 1, log_p)
    return tl.where(inside, gce_log_weight(log_p, log_q, params_ptr), -INF)


@triton.jit
def truncated_gce_loss(log_p, log_q, params_ptr):
    """f = (1 - max(p, k)^q) / q."""
    log_k = log_param(params_ptr, 1, log_p)
    return gce_loss(tl.where(log_p < log_k, log_k, log_p), log_q, params_ptr)


@triton.jit
def focal_log_weight(log_p, log_q, params_ptr):
    """w = 2 q^gamma (q - gamma p log p) = 2 q^(gamma + 1) (1 + gamma share), share = -p log p / q."""
    gamma = param(params_ptr, 0, log_p)
    certain = log_q < NEGLIGIBLE
    share = exp(log_p) * -log_p / exp(tl.where(certain, 0.0, log_q))
    share = tl.where(certain, 1.0, share)
    return LN2 + (gamma + 1.0) * log_q + tl.log(1.0 + gamma * share)


@triton.jit
def focal_loss(log_p, log_q, params_ptr):
    """f = -q^gamma log p."""
    return exp(param(params_ptr, 0, log_p) * finite(log_q)) * -log_p


@triton.jit
def sce_log_weight(log_p, log_q, params_ptr):
    """w = 2 q (alpha + beta A p)."""
    alpha = param(params_ptr, 0, log_p)
    reverse = param(params_ptr, 1, log_p) * param(params_ptr, 2, log_p)
    return LN2 + log_q + log_sum(log_nonnegative(alpha), log_nonnegative(reverse) + log_p)


@triton.jit
def sce_loss(log_p, log_q, params_ptr):
    """f = -alpha log p + beta A q."""
    alpha = param(params_ptr, 0, log_p)
    reverse = param(params_ptr, 1, log_p) * param(params_ptr, 2, log_p)
    # A multiple of 0 of an infinite -log p is 0.
    return alpha * tl.where(alpha == 0.0, 0.0, -log_p) + reverse * exp(log_q)


@triton.jit
def taylorce_log_weight(log_p, log_q, params_ptr):
    """w = 2 q (1 - q^t) = 2 p q terms, terms = 1 + q + ... + q^(t - 1)."""
    t = param(params_ptr, 0, log_p)
    hopeless = log_p < NEGLIGIBLE
    terms = -expm1_negative(t * log_q) / exp(tl.where(hopeless, 0.0, log_p))
    return LN2 + log_p + log_q + tl.log(tl.where(hopeless, t, terms))


@triton.jit
def taylorce_loss(log_p, log_q, params_ptr):
    """f = q + q^2 / 2 + ... + q^t / t."""
    q = exp(log_q)
    power = q
    total = q
    for i in range(2, tl.load(params_ptr).to(tl.int32) + 1):
        power *= q
        total += power / i
    return total


@triton.jit
def poly1_log_weight(log_p, log_q, params_ptr):
    """w = 2 q (1 + eps p), where eps < 0 with 1 + eps p = (1 + eps) - eps q."""
    eps = param(params_ptr, 0, log_p)
    below = tl.minimum(tl.load(params_ptr), 0.0)
    least = log_nonnegative((1.0 + below).to(log_p.dtype))
    negative = log_sum(least, log_nonnegative(-below.to(log_p.dtype)) + log_q)
    return LN2 + log_q + negative + tl.log(1.0 + tl.maximum(eps, 0.0) * exp(log_p))


@triton.jit
def poly1_loss(log_p, log_q, params_ptr):
    """f = -log p + eps q, where eps < 0 and q is small as -(1 + eps) log p - eps (-log p - q)."""
    eps = param(params_ptr, 0, log_p)
    one_eps = (tl.load(params_ptr) + 1.0).to(log_p.dtype)
    q = exp(log_q)
    small = tl.where(eps < 0.0, q, 1.0) <= 0.5
    excess = log_excess(tl.where(small, q, 0.0))
    return tl.where(small, one_eps * tl.where(small, -log_p, 0.0) - eps * excess, -log_p + eps * q)


@triton.jit
def phuberce_log_weight(log_p, log_q, params_ptr):
    """w = 2 q min(1, tau p)."""
    return LN2 + log_q + tl.minimum(log_param(params_ptr, 0, log_p) + log_p, 0.0)


@triton.jit
def phuberce_loss(log_p, log_q, params_ptr):
    """f = log tau + (1 - tau p) where tau p <= 1, else -log p."""
    log_tau = log_param(params_ptr, 0, log_p)
    relative = log_tau + log_p
    return tl.where(relative <= 0.0, log_tau - expm1_negative(tl.minimum(relative, 0.0)), -log_p)


@triton.jit
def aul_log_weight(log_p, log_q, params_ptr):
    """w = 2 p q (a - p)^(power - 1) = 2 p (a - p)^power / (1 + (a - 1) / q), with a - p = (a - 1) + q."""
    log_over = log_nonnegative((tl.load(params_ptr) - 1.0).to(log_p.dtype))
    return LN2 + log_p + param(params_ptr, 1, log_p) * log_sum(log_over, log_q) - softplus(log_over - log_q)


@triton.jit
def aul_loss(log_p, log_q, params_ptr):
    """f = ((a - p)^power - (a - 1)^power) / power."""
    log_over = log_nonnegative((tl.load(params_ptr) - 1.0).to(log_p.dtype))
    power = param(params_ptr, 1, log_p)
    log_q = finite(log_q)
    return exp(power * log_sum(log_over, log_q)) * -expm1_negative(-power * softplus(log_q - log_over)) / power


@triton.jit
def agce_log_weight(log_p, log_q, params_ptr):
    """w = 2 p q (a + p)^(power - 1) = 2 q (a + p)^power / (1 + a / p)."""
    log_a = log_nonnegative(param(params_ptr, 0, log_p))
    return LN2 + log_q + param(params_ptr, 1, log_p) * log_sum(log_a, log_p) - softplus(log_a - log_p)


@triton.jit
def agce_loss(log_p, log_q, params_ptr):
    """f = ((a + 1)^power - (a + p)^power) / power."""
    a = param(params_ptr, 0, log_p)
    power = param(params_ptr, 1, log_p)
    log_top = tl.log(1.0 + a)
    rest = exp(log_q) / (1.0 + a)
    small = tl.where(rest <= 0.5, rest, 0.0)
    below = log_sum(log_nonnegative(a), finite(log_p)) - log_top
    ratio = tl.where(rest <= 0.5, log_1m(small, 1.0 - small), below)
    return exp(power * log_top) * -expm1_negative(power * ratio) / power


@triton.jit
def ael_log_weight(log_p, log_q, params_ptr):
    """w = (2 / a) p q exp(-p / a)."""
    a = param(params_ptr, 0, log_p)
    return LN2 - tl.log(a) + log_p + log_q - exp(log_p) / a


@triton.jit
def ael_loss(log_p, log_q, params_ptr):
    """f = exp(-p / a)."""
    return exp(-exp(log_p) / param(params_ptr, 0, log_p))


@triton.jit
def js_log_weight(log_p, log_q, params_ptr):
    """w = 2 / (-log(1 - pi)) p q log(1 + pi / ((1 - pi) p))."""
    pi = param(params_ptr, 0, log_p)
    log_rest = log_1m(pi, (1.0 - tl.load(params_ptr)).to(log_p.dtype))
    return LN2 - tl.log(-log_rest) + log_p + log_q + tl.log(softplus(tl.log(pi) - log_rest - log_p))


@triton.jit
def js_loss(log_p, log_q, params_ptr):
    """f = (-pi log m - (1 - pi) q log(1 - pi) - (1 - pi) p log(m / p)) / Z, m = pi + (1 - pi) p = 1 - (1 - pi) q."""
    pi = param(params_ptr, 0, log_p)
    rest = (1.0 - tl.load(params_ptr)).to(log_p.dtype)
    log_rest = log_1m(pi, rest)
    log_p = finite(log_p)
    log_q = finite(log_q)
    p = exp(log_p)
    q = exp(log_q)
    log_m = log_1m(rest * q, pi + rest * p)
    divergence = -pi * log_m - rest * (q * log_rest + p * softplus(tl.log(pi) + log_q - log_p))
    return divergence / (-rest * log_rest)


@triton.jit
def self_paced_log_weight(log_p, log_q, params_ptr):
    """w = 2 q where -log p < threshold."""
    return tl.where(-log_p < param(params_ptr, 0, log_p), LN2 + log_q, -INF)


@triton.jit
def self_paced_loss(log_p, log_q, params_ptr):
    """f = min(-log p, threshold)."""
    threshold = param(params_ptr, 0, log_p)
    return tl.where(-log_p > threshold, threshold, -log_p)


@triton.jit
def self_paced_linear_log_weight(log_p, log_q, params_ptr):
    """w = 2 q max(0, 1 + log p / threshold)."""
    share = 1.0 + log_p / param(params_ptr, 0, log_p)
    return tl.where(share > 0.0, LN2 + log_q + tl.log(tl.where(share > 0.0, share, 1.0)), -INF)


@triton.jit
def self_paced_linear_loss(log_p, log_q, params_ptr):
    """Reported: -max(0, 1 + log p / threshold) log p."""
    log_p = finite(log_p)
    share = 1.0 + log_p / param(params_ptr, 0, log_p)
    return tl.where(share < 0.0, 0.0, share) * -log_p


FAMILIES = {
    "dm": (dm_log_weight, None),
    "normal": (normal_log_weight, None),
    "beta": (beta_log_weight, None),
    "cce": (cce_log_weight, cce_loss),
    "mae": (mae_log_weight, mae_loss),
    "dft": (mae_log_weight, dft_loss),
    "mse": (mse_log_weight, mse_loss),
    "gce": (gce_log_weight, gce_loss),
    "truncated_gce": (truncated_gce_log_weight, truncated_gce_loss),
    "focal": (focal_log_weight, focal_loss),
    "sce": (sce_log_weight, sce_loss),
    "taylorce": (taylorce_log_weight, taylorce_loss),
    "poly1": (poly1_log_weight, poly1_loss),
    "phuberce": (phuberce_log_weight, phuberce_loss),
    "aul": (aul_log_weight, aul_loss),
    "agce": (agce_log_weight, agce_loss),
    "ael": (ael_log_weight, ael_loss),
    "js": (js_log_weight, js_loss),
    "self_paced": (self_paced_log_weight, self_paced_loss),
    "self_paced_linear": (self_paced_linear_log_weight, self_paced_linear_loss),
}
