"""Accuracy near p = 1, where the usual formula has no digits left: `python -m bench.accuracy`.

At V = 128256 in fp32 with eps = 0, 1 - p from 1e-3 to 1e-12: the error of the label's gradient entry and of the row's L1
norm, relative to the reference in fp64, and the largest error of an element of the row as a share of the bound of
tests/tolerance.py; for the CPU implementation, the kernels (in Triton's interpreter where there is no GPU) and the formula as
it is written.

The margin of such a row is 7 to 28, of which fp32 rounds half an ulp away: 2.4e-7 to 9.5e-7. An EDF that goes to 0 with 1 - p
has that as a relative error of its weight; DM, which goes to 1, has not.
"""

import argparse
import math
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CLASSES = 128256


def near_certainty(classes: int):
    """fp32 logits (10, V) whose label 0 has 1 - p = 1e-3, ..., 1e-12, and target."""
    import torch

    q = torch.logspace(-3, -12, 10, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, classes, generator=generator, dtype=torch.float64)
    logits[:, 0] = -math.inf
    logits[:, 0] = logits.logsumexp(1) + torch.log((1 - q) / q)
    return logits.float(), torch.zeros(10, dtype=torch.int64)


def gradients(emphasis, classes: int) -> dict:
    """dlogits (10, V) in fp64 by each way; "exact" is the reference in fp64."""
    import torch

    import fused_dm
    from fused_dm import reference

    logits, target = near_certainty(classes)

    def by(function, given=logits):
        leaf = given.clone().requires_grad_()
        function(leaf).backward()
        return leaf.grad.double().cpu()

    ways = {
        "exact": by(lambda z: reference.dm_loss(z, target, emphasis, eps=0.0).loss, logits.double()),
        "CPU implementation": by(lambda z: fused_dm.dm_loss(z, target, emphasis, eps=0.0, impl="cpu")),
    }
    if "triton" in fused_dm.available_impls():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        there = target.to(device)
        ways["kernels"] = by(lambda z: fused_dm.dm_loss(z, there, emphasis, eps=0.0, impl="triton"), logits.to(device))
    ways["literal formula"] = by(lambda z: reference.dm_loss(z, target, emphasis, eps=0.0, form="literal").loss)
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.md")
    arguments = parser.parse_args()
    import torch
    from tolerance import expected, share_of_bound

    from fused_dm import edf

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, kernels in Triton's interpreter"
    lines = [
        "# Accuracy near p = 1",
        "",
        f"`python -m bench.accuracy`: V = {arguments.classes}, fp32, eps = 0; errors relative to the reference in fp64, and "
        f"the largest of an element as a share of its bound; torch {torch.__version__}, {where}.",
    ]
    for emphasis in (edf.DM(beta=8, lambd=0.5), edf.CCE(), edf.GCE(q=0.7)):
        ways = gradients(emphasis, arguments.classes)
        exact = ways.pop("exact")
        allowed = expected(*near_certainty(arguments.classes), emphasis, eps=0.0).allowed["dlogits"]
        lines += [
            "",
            f"`{emphasis}`",
            "",
            "| 1 - p | " + " | ".join(f"{name}: label | L1 norm | of the bound" for name in ways) + " |",
            "|---|" + "---|" * (3 * len(ways)),
        ]
        for row in range(exact.shape[0]):
            cells = [f"1e-{row + 3}"]
            for got in ways.values():
                label = (got[row, 0] - exact[row, 0]).abs() / exact[row, 0].abs()
                norm = (got[row].abs().sum() - exact[row].abs().sum()).abs() / exact[row].abs().sum()
                share = share_of_bound(got[row], exact[row], allowed[row]).max()
                cells += [f"{label.item():.1e}", f"{norm.item():.1e}", f"{share.item():.2g}"]
            lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output.write_text(text)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("kernels", "tests")]
    import importlib.util

    if importlib.util.find_spec("torch") and not __import__("torch").cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    main()
