"""Elementary functions that Triton lacks or computes with a large relative error near their zeros."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    """exp(x), as one hardware exp2."""
    return tl.exp2(x * LOG2E)


@triton.jit
def mantissa_and_exponent(x):
    """x = mantissa 2^exponent for an fp64 x, with 1 <= |mantissa| < 2; 0, inf and nan are their own mantissa."""
    bits = x.to(tl.int64, bitcast=True)
    field = (bits >> 52) & 0x7FF
    ordinary = (field != 0) & (field != 0x7FF)
    mantissa = ((bits & ~(0x7FF << 52)) | (1023 << 52)).to(tl.float64, bitcast=True)
    return tl.where(ordinary, mantissa, x), tl.where(ordinary, field - 1023, 0).to(tl.int32)


@triton.jit
def power_of_2(exponent):
    """2^exponent in fp32 for int32 exponents, made of its bits; out of their range the least or the largest normal one."""
    return ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def over_divisor(factor, log_weight, divisor):
    """factor exp(log_weight) / divisor for an fp64 divisor, in the dtype of factor.

    In fp32 it has its digits even where exp(log_weight) or the divisor is out of range: their powers of 2 meet first.
    """
    if factor.dtype == tl.float64:
        return factor * exp(log_weight) / divisor
    else:
        mantissa, exponent = mantissa_and_exponent(divisor)
        power = log_weight * LOG2E
        whole = tl.minimum(tl.maximum(tl.floor(power + 0.5), -1e4), 1e4)
        rest = whole.to(tl.int32) - exponent
        # 2^rest alone may be out of range, where factor is at the other end of it.
        half = rest >> 1
        return factor * tl.exp2(power - whole) / mantissa.to(tl.float32) * power_of_2(half) * power_of_2(rest - half)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1, from 2 artanh(u / (2 + u))."""
    s = u / (2.0 + u)
    s2 = s * s
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 6
    series = s2 * 0.0
    for i in tl.static_range(TERMS):
        series = series * s2 + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2.0 * s * series


@triton.jit
def expm1_negative(x):
    """exp(x) - 1 for x <= 0, from the Taylor series where |x| < 1/2."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 9
    # Not tl.maximum, which drops a nan.
    small = tl.where(x < -0.5, -0.5, x)
    series = small * 0.0 + 1.0
    for i in tl.static_range(TERMS - 1):
        series = 1.0 + series * small / (TERMS - i)
    return tl.where(x < -0.5, exp(x) - 1.0, small * series)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative 4 e / (1 + e)^2, e = exp(-2 |x|): neither cancels, where 1 - tanh(x)^2 would."""
    y = -2.0 * tl.abs(x)
    e = exp(y)
    share = 1.0 / (1.0 + e)
    size = -expm1_negative(y) * share
    return tl.where(x < 0.0, -size, size), 4.0 * e * share * share


@triton.jit
def log_nonnegative(x):
    """log(x), and -1e30 for 0, so that 0 times it is 0."""
    return tl.where(x > 0.0, tl.log(tl.where(x > 0.0, x, 1.0)), -1e30)


@triton.jit
def log_1m(x, rest):
    """log(1 - x) for 0 <= x < 1, given rest = 1 - x too, of which one has its digits."""
    small = tl.where(x <= 0.5, x, 0.0)
    return tl.where(x <= 0.5, -log1p_unit(small / (1.0 - small)), tl.log(tl.where(x <= 0.5, 1.0, rest)))


@triton.jit
def log_excess(q):
    """-log(1 - q) - q for 0 <= q <= 1/2: with s = q / (2 - q), 2 artanh(s) - q = s q + 2 (s^3 / 3 + s^5 / 5 + ...)."""
    s = q / (2.0 - q)
    s2 = s * s
    TERMS: tl.constexpr = 17 if q.dtype == tl.float64 else 6
    series = s2 * 0.0
    for i in tl.static_range(TERMS):
        series = (series + 1.0 / (2 * (TERMS - i) + 1)) * s2
    return s * q + 2.0 * s * series


@triton.jit
def softplus(x):
    """log(1 + exp(x)), with a small relative error at any x."""
    return tl.maximum(x, 0.0) + log1p_unit(exp(-tl.abs(x)))


@triton.jit
def log_sum(x, y):
    """log(exp(x) + exp(y)) for finite x and y."""
    return tl.maximum(x, y) + log1p_unit(exp(-tl.abs(x - y)))


@triton.jit
def sigmoids(margin):
    """p = sigmoid(margin), q = 1 - p, log p and log q, each with a small relative error at any margin."""
    u = exp(-tl.abs(margin))
    log1p_u = log1p_unit(u)
    log_p = tl.minimum(margin, 0.0) - log1p_u
    log_q = tl.minimum(-margin, 0.0) - log1p_u
    larger = 1.0 / (1.0 + u)
    q = tl.where(margin > 0, u * larger, larger)
    return q, log_p, log_q
