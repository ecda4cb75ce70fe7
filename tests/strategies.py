"""Hypothesis strategies for the EDFs of the catalogue, and where their weights jump."""

import math

import torch
from hypothesis import strategies as st

from fused_dm import edf


def between(low, high):
    return st.floats(low, high, allow_subnormal=False)


# Ranges that training uses, and their ends.
PARAMETERS = {
    edf.DM: {"beta": between(-20, 20), "lambd": between(0, 4)},
    edf.Exponential: {"beta": between(-20, 20)},
    edf.Normal: {"psi": between(-0.5, 1.5), "beta": between(-20, 20)},
    edf.Beta: {"alpha": between(0.05, 6), "eta": between(0.05, 6)},
    edf.Uniform: {},
    edf.IMAE: {"T": between(-20, 20)},
    edf.CCE: {},
    edf.MAE: {},
    edf.MSE: {},
    edf.GCE: {"q": between(0.01, 1)},
    edf.TruncatedGCE: {"q": between(0.01, 1), "k": between(0.01, 0.99)},
    edf.DFT: {},
    edf.Focal: {"gamma": between(0, 6)},
    edf.SCE: {"alpha": st.just(0.0) | between(1e-30, 6), "beta": between(0.01, 6), "A": between(0.1, 10)},
    edf.TaylorCE: {"t": st.integers(1, 64)},
    edf.Poly1: {"eps": between(-1, 6)},
    edf.PHuberCE: {"tau": between(1, 100)},
    edf.AUL: {"a": between(1, 10), "q": between(0.05, 4)},
    edf.AGCE: {"a": st.just(0.0) | between(1e-30, 10), "q": between(0.05, 4)},
    edf.AEL: {"a": between(0.05, 10)},
    edf.JS: {"pi": between(0.01, 0.99)},
    edf.SelfPaced: {"threshold": between(0.05, 20)},
    edf.SelfPacedLinear: {"threshold": between(0.05, 20)},
}


def of_kind(kind):
    return st.builds(kind, **PARAMETERS[kind])


def _breaks(emphasis):
    """The p at which w or its slope jumps."""
    own = {
        edf.TruncatedGCE: lambda e: [e.k],
        edf.PHuberCE: lambda e: [1 / e.tau],
        edf.SelfPaced: lambda e: [math.exp(-e.threshold)],
        edf.SelfPacedLinear: lambda e: [math.exp(-e.threshold)],
        edf.Truncated: lambda e: [e.low, e.high],
    }.get(type(emphasis), lambda e: [])(emphasis)
    return own + [p for member in getattr(emphasis, "members", ()) for p in _breaks(member)]


def from_breaks(emphasis, margins):
    """How far the margins are from the nearest one at which w or its slope jumps; inf where there is none."""
    distance = torch.full_like(margins, math.inf)
    for p in _breaks(emphasis):
        if 0 < p < 1:
            distance = torch.minimum(distance, (margins - math.log(p) + math.log1p(-p)).abs())
    return distance
