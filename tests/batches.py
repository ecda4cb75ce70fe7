"""Batches to test on, and how to run an implementation on one."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_dm
from fused_dm import edf

GPU = torch.cuda.is_available()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMPHASES = (
    edf.DM(beta=8, lambd=0.5),
    edf.DM(beta=12, lambd=2),
    edf.Exponential(beta=2),
    edf.Exponential(beta=-3),
    edf.IMAE(T=8),
    edf.Uniform(),
    edf.CCE(),
    edf.MAE(),
    edf.GCE(q=0.7),
)
# Every other EDF of the catalogue, at ordinary parameters and at the ends of their ranges.
CATALOGUE = (
    edf.Normal(psi=0.3, beta=20),
    edf.Normal(psi=1.2, beta=-5),
    edf.Beta(alpha=2, eta=3),
    edf.Beta(alpha=0.5, eta=3),
    edf.Beta(alpha=3, eta=0.5),
    edf.DFT(),
    edf.MSE(),
    edf.TruncatedGCE(q=0.7, k=0.5),
    edf.Focal(gamma=0),
    edf.Focal(gamma=2),
    edf.SCE(alpha=0.1, beta=1, A=4),
    edf.SCE(alpha=0, beta=1, A=4),
    edf.TaylorCE(t=1),
    edf.TaylorCE(t=6),
    edf.TaylorCE(t=64),
    edf.Poly1(eps=2),
    edf.Poly1(eps=-0.5),
    edf.Poly1(eps=-1),
    edf.PHuberCE(tau=10),
    edf.PHuberCE(tau=1),
    edf.AUL(a=1.5, q=0.9),
    edf.AUL(a=1, q=2),
    edf.AGCE(a=1, q=2),
    edf.AGCE(a=0, q=0.7),
    edf.AEL(a=2.5),
    edf.AEL(a=0.1),
    edf.JS(pi=0.5),
    edf.JS(pi=0.01),
    edf.JS(pi=0.99),
    edf.SelfPaced(threshold=1.5),
    edf.SelfPacedLinear(threshold=2),
)
COMPOSITIONS = (
    0.1 * edf.CCE() + 4 * edf.MAE(),
    edf.DM(beta=8, lambd=0.5) * edf.CCE(),
    edf.DM(beta=8, lambd=0.5) + 2 * edf.GCE(q=0.5) + edf.Uniform(),
    2 * (edf.Beta(alpha=0.5, eta=2) * edf.MSE() * (edf.MAE() + edf.JS())),
    edf.GCE(q=0.7).truncate(0.2, 0.9),
    (edf.CCE() + edf.Focal()).truncate(0, 0.75),
    edf.MAE().floor(0.1),
    (edf.TruncatedGCE() + edf.IMAE()).floor(1e-30) * (3 * edf.SelfPacedLinear(threshold=4)),
)
IMPLEMENTATIONS = ("reference", "cpu", "triton")

# (N, V), each with its reason. Blocks hold 4096 classes; in the fused kernel 16384, or a whole row of up to 64 KiB.
SHAPES = {
    "no rows": (0, 10),
    "one class": (5, 1),
    "two classes": (5, 2),
    "one row": (1, 37),
    "one row more than a tile": (65, 10),
    "odd, less than a tile": (7, 101),
    "128-bit rows that 16 does not divide": (3, 1000),
    "one less than a block": (2, 4095),
    "a block": (2, 4096),
    "one more than a block": (2, 4097),
    "three blocks and a rest": (2, 3 * 4096 + 7),
    "as many as registers hold of 16 bits": (2, 32768),
    "one more than registers hold": (2, 32769),
    "fused kernel, three blocks and a rest": (2, 3 * 16384 + 7),
}


class Batch(NamedTuple):
    logits: Tensor
    target: Tensor


def device_of(impl: str) -> str:
    return "cuda" if GPU and impl == "triton" else "cpu"


def make(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 2.0,
    margins: float = 8.0,
    offset: float = 0.0,
    ignored: float = 0.0,
) -> Batch:
    """Logits whose label probabilities spread over (0, 1): margins are uniform in +-`margins`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(classes, (rows,), generator=generator)
    if classes > 1:
        lse = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
        wanted = (torch.rand(rows, generator=generator, dtype=torch.float64) * 2 - 1) * margins
        logits.scatter_(1, target[:, None], (lse + wanted)[:, None])
    target = torch.where(torch.rand(rows, generator=generator) < ignored, -100, target)
    return Batch((logits + offset).to(dtype), target)


def run(impl: str, logits: Tensor, target: Tensor, emphasis: Any, dloss: Tensor | None = None, **options: Any):
    """DMOutput and dlogits of an implementation, on the device that suits it."""
    device = device_of(impl)
    leaf = logits.detach().to(device, copy=True).requires_grad_()
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    output = fused_dm.dm_loss(leaf, target.to(device), emphasis, impl=impl, return_output=True, **options)
    output.loss.backward(torch.ones_like(output.loss) if dloss is None else dloss.to(output.loss))
    return output, leaf.grad


def with_assigned(criterion, settings):
    """The module with settings that its constructor did not see."""
    for name, value in settings.items():
        setattr(criterion, name, value)
    return criterion
