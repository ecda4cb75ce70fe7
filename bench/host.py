"""What a step takes the host: checks of the arguments, autograd, the choice of the launches and the launches themselves.

Without a GPU the kernels are compiled for sm_90 and given to a driver that launches nothing (`bench.null_driver`): all is
counted but the driver's own call.

    python -m bench.host
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench import null_driver
from fused_dm import _validation, dm_loss, edf

DM = edf.DM(beta=8, lambd=0.5)
# Not enough to keep a device or a CPU busy, too many rows for one program: forward pass, totals and gradient are a launch each.
ROWS, CLASSES = 1024, 16


def steps(logits: Tensor, target: Tensor) -> dict[str, Callable[[], Tensor]]:
    weights = {"weight": torch.ones(CLASSES, device=logits.device), "sample_weight": torch.ones(ROWS, device=logits.device)}
    found = {
        "dm_loss, sum of weights": lambda: dm_loss(logits, target, DM, impl="triton"),
        "dm_loss, known divisor": lambda: dm_loss(logits, target, DM, reduction="sum", normalizer=float(ROWS), impl="triton"),
        "dm_loss, mean": lambda: dm_loss(logits, target, edf.CCE(), reduction="mean", impl="triton"),
        "dm_loss, weighted": lambda: dm_loss(logits, target, DM, impl="triton", **weights),
        "dm_loss, weighted mean": lambda: dm_loss(logits, target, edf.CCE(), reduction="mean", impl="triton", **weights),
    }
    # Elsewhere it would compute.
    return found | {"F.cross_entropy": lambda: F.cross_entropy(logits, target)} if logits.is_cuda else found


def microseconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and least of so many runs."""
    found = []
    for number in range(repeats + 20):
        start = time.perf_counter()
        run()
        if number >= 20:
            found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found), min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time that a training step takes the host.")
    parser.add_argument("--repeats", type=int, default=2000, help="runs of each")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    launches = 0

    def launched(*_: object) -> None:
        nonlocal launches
        launches += 1

    if not gpu:
        null_driver.install(launched)
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if gpu else "no GPU, a driver that launches nothing"
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}")
    print(f"{ROWS} x {CLASSES} bf16, {arguments.repeats} runs, us: median, least" + ("" if gpu else "; launches of Triton"))
    logits = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16, device=device, requires_grad=True)
    target = torch.zeros(ROWS, dtype=torch.int64, device=device)
    with mock.patch.object(_validation, "interprets", return_value=True):
        for step, loss in steps(logits, target).items():

            def run(loss: Callable[[], Tensor] = loss) -> None:
                logits.grad = None
                loss().backward()

            median, least = microseconds(run, arguments.repeats)
            launches = 0
            run()
            torch.cuda.synchronize() if gpu else None
            print(f"{step:26} {median:7.0f} {least:7.0f}" + ("" if gpu else f" {launches:3}"))


if __name__ == "__main__":
    main()
