"""Emphasis density functions on the device.

A family is a pair of `@triton.jit` functions of `(log_p, log_q, params_ptr)`: the natural log of w, and the closed
form f of the loss whose gradient has that weight, or None where there is none. `params_ptr` points to the family's
parameters in fp64; each is loaded once a program. log p and log q are at least -1e30.
"""

import triton
import triton.language as tl

from .numerics import LN2, exp, expm1_negative


@triton.jit
def dm_log_weight(log_p, log_q, params_ptr):
    """w = exp(beta p^lambd q)."""
    beta = tl.load(params_ptr).to(log_p.dtype)
    lambd = tl.load(params_ptr + 1).to(log_p.dtype)
    return beta * exp(lambd * log_p + log_q)


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
def gce_log_weight(log_p, log_q, params_ptr):
    """w = 2 p^q (1 - p)."""
    power = tl.load(params_ptr).to(log_p.dtype)
    return LN2 + power * log_p + log_q


@triton.jit
def gce_loss(log_p, log_q, params_ptr):
    """f = (1 - p^q) / q."""
    power = tl.load(params_ptr).to(log_p.dtype)
    return -expm1_negative(power * log_p) / power


FAMILIES = {
    "dm": (dm_log_weight, None),
    "cce": (cce_log_weight, cce_loss),
    "mae": (mae_log_weight, mae_loss),
    "gce": (gce_log_weight, gce_loss),
}
