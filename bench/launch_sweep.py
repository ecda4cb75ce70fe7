"""How the kernels should be launched, measured on the GPU that is there: `python -m bench.launch_sweep`.

Each kernel is run at other tiles, warps and stages than `fused_dm/_launch.py` chooses, and timed beside that choice and a copy
of the same logits. All of them are compiled first, by several processes. See bench/README.md.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.study import DM, RESULTS, Case, batch, copy, machine, spread, times
from fused_dm import _launch, _triton
from fused_dm._launch import Launch, Sizes

# Passes over the logits that a kernel's task needs.
PASSES = {"forward": 1, "gradient": 2, "fused": 2}
MANY_CLASSES = [(8192, 32000), (8192, 50257), (8192, 50304), (8192, 128256), (8192, 262144), (16, 10_000_000)]
FEW_CLASSES = [(4096, 1000), (4096, 1001), (32768, 256), (32768, 257), (32768, 2048)]
CASES = [Case(*shape, "bfloat16") for shape in MANY_CLASSES + FEW_CLASSES]
CASES += [Case(8192, 128256, "float32"), Case(8192, 32000, "float32"), Case(4096, 1000, "float32")]


# Elements of a block of the fused kernel, warps, blocks in registers, and programs of a multiprocessor; by bytes of a logit.
KEPT_16 = [(16384, 16, 3, 1), (16384, 32, 2, 1), (16384, 32, 3, 1), (8192, 16, 4, 1), (8192, 16, 6, 1), (8192, 16, 8, 1)]
KEPT_16 += [(8192, 16, 10, 1), (8192, 16, 2, 2), (8192, 16, 4, 2), (8192, 8, 2, 2), (8192, 8, 4, 2), (4096, 8, 8, 2)]
KEPT_16 += [(4096, 8, 12, 2), (4096, 8, 2, 3), (4096, 8, 4, 3), (4096, 8, 6, 3), (4096, 8, 8, 3), (2048, 8, 16, 3)]
KEPT_32 = [(8192, 16, 2, 1), (8192, 16, 3, 1), (8192, 16, 4, 1), (4096, 16, 6, 1), (4096, 16, 8, 1), (4096, 16, 2, 2)]
KEPT_32 += [(4096, 8, 2, 2), (4096, 8, 4, 2), (4096, 8, 1, 3), (4096, 8, 2, 3)]
KEPT = {2: KEPT_16, 4: KEPT_32}


@dataclass(frozen=True)
class Trial:
    kernel: str
    case: Case
    launch: Launch

    @property
    def label(self) -> str:
        launch = self.launch
        parts = f"{launch.block_n}x{launch.block_v}, {launch.num_warps} warps, {launch.stages} stages, {launch.lanes} lanes"
        most = f", {launch.registers} registers" if launch.registers else ""
        most += f", {launch.kept} kept" if launch.kept > 1 else ""
        return f"{launch.way} {parts}, {launch.spans(sizes_of(self.case))} spans, {launch.repeat} tiles{most}"


def sizes_of(case: Case) -> Sizes:
    itemsize = getattr(torch, case.dtype).itemsize
    return _triton._Layout((case.rows, case.classes), itemsize, logits=(case.classes, 1)).sizes


def chosen(kernel: str, case: Case) -> Launch:
    """What the package chooses on this device."""
    return getattr(_launch, kernel)(sizes_of(case), _triton._properties(torch.device("cuda", 0)))


def trials(kernel: str, case: Case) -> list[Trial]:
    """The package's choice first, then the others."""
    first, sizes, device = chosen(kernel, case), sizes_of(case), _triton._properties(torch.device("cuda", 0))
    found = [first]

    def add(rows: int, block_v: int, warps: int, stages: int = 1, repeat: int = 1) -> None:
        several = rows == 1 and case.classes > block_v and kernel != "gradient"
        span = -(-first.span // block_v) * block_v
        if block_v * stages * sizes.itemsize <= 200_000:
            found.append(
                Launch(first.way, rows, block_v, warps, span, first.stream, 32 * warps if several else 1, stages, repeat=repeat)
            )

    if case.classes > 4096:
        blocks = [(2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)]
        for block_v, warps in blocks if kernel != "fused" else ():
            for stages in (1, 2, 3) if kernel == "gradient" else (1,):
                if case.classes > block_v or stages == 1:
                    add(1, block_v, warps, stages)
            for repeat in (2, 4) if kernel == "forward" and first.way == "tiles" else ():
                add(1, block_v, warps, 1, repeat)
        for choice in KEPT[sizes.itemsize] if kernel == "fused" and first.way == "tiles" else ():
            if case.classes > choice[0]:
                found.append(_launch.in_blocks(sizes, device, _launch.InBlocks(1 << 62, *choice)))
    else:
        width = _launch._power_of_2(sizes.columns)
        for elements in (1024, 2048, 4096, 8192):
            for warps in (1, 2, 4, 8):
                if 16 <= elements // (32 * warps) <= 32 and elements >= width:
                    for repeat in (1, 2, 4, 8, 16) if kernel == "forward" else (1,):
                        if repeat * elements // width <= 128:
                            add(elements // width, width, warps, 1, repeat)
    return [Trial(kernel, case, launch) for launch in dict.fromkeys(found)]


def task(trial: Trial, logits: Tensor, target: Tensor) -> Callable[[Any], Any]:
    params = torch.tensor([0.0, 8.0, 0.5], dtype=torch.float64, device="cuda")
    _, rows, totals = _triton.loss_and_rows(logits, target, None, None, params, None, DM.family, -100)
    divisor, dloss = torch.full((), 4.0, dtype=torch.float64, device="cuda"), torch.ones((), device="cuda")
    out = torch.empty_like(logits)
    return {
        "forward": lambda _: _triton.loss_and_rows(logits, target, None, None, params, None, DM.family, -100),
        "gradient": lambda _: _triton.gradient(logits, target, rows, totals, dloss, -100, out),
        "fused": lambda _: _triton.loss_and_rows(logits, target, None, None, params, divisor, DM.family, -100, out),
    }[trial.kernel]


@contextlib.contextmanager
def launched(trial: Trial) -> Iterator[None]:
    _triton.forget_plans()
    try:
        with mock.patch.object(_launch, trial.kernel, return_value=trial.launch):
            yield
    finally:
        _triton.forget_plans()


def one_at_a_time(wanted: bool) -> None:
    """Have rows that begin anywhere read one element at a time, as those are whose gradient lies otherwise."""
    if wanted:
        _launch.SHIFTED = sys.maxsize


def compile_trial(trial: Trial) -> str:
    """Leave the kernel in Triton's cache: run it on few rows."""
    rows = min(trial.case.rows, 256)
    logits = torch.empty(rows, trial.case.classes, dtype=getattr(torch, trial.case.dtype), device="cuda")
    target = torch.zeros(rows, dtype=torch.int64, device="cuda")
    try:
        run = task(trial, logits, target)
        with launched(trial):
            run(None)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    return ""


def sweep(found: list[Trial], path: Path, seconds: float, budget: float, narrow: bool) -> dict[str, Any]:
    start = time.perf_counter()
    results: dict[str, Any] = {**machine(), "command": " ".join(sys.argv[1:]), "cases": {}}
    workers = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("spawn"), one_at_a_time, (narrow,)) as pool:
        failures = dict(zip(found, pool.map(compile_trial, found, chunksize=4), strict=True))
    print(f"{len(found)} launches compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for case in dict.fromkeys(trial.case for trial in found):
        if time.perf_counter() - start > budget:
            print(f"no time left for {case.name}")
            break
        logits, target = batch(case, "cuda")
        entry = results["cases"][case.name] = {**copy(logits, seconds), "kernels": {}}
        for trial in found:
            if trial.case != case:
                continue
            of_kernel = entry["kernels"].setdefault(trial.kernel, [])
            timed: dict[str, Any] = {"label": trial.label, "chosen": trial.launch == chosen(trial.kernel, case)}
            if failures[trial]:
                timed["failed"] = failures[trial]
            else:
                run = task(trial, logits, target)
                with launched(trial):
                    timed["ms"] = spread(times(lambda: None, run, seconds))
            of_kernel.append(timed)
        path.write_text(json.dumps(results, indent=1) + "\n")
        del logits, target
        torch.cuda.empty_cache()
    return results


def table(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [f"{results['device']}; {versions}.", "", f"    python -m bench.launch_sweep {results['command']}"]
    for name, case in results["cases"].items():
        rate = case["copy_bytes"] / case["copy_ms"]["q50"]
        lines += ["", f"### {name}", "", f"A copy: {case['copy_ms']['q50']:.4f} ms, {rate / 1e6:.0f} GB/s."]
        for kernel, found in case["kernels"].items():
            lines += ["", f"| {kernel} | ms | of the limit |", "|---|---|---|"]
            limit = PASSES[kernel] * case["copy_bytes"] / 2 / rate
            timed = sorted((row for row in found if "ms" in row), key=lambda row: row["ms"]["q50"])
            for row in timed:
                name_of = f"**{row['label']}**" if row["chosen"] else row["label"]
                lines.append(f"| {name_of} | {row['ms']['q50']:.4f} | {limit / row['ms']['q50']:.3f} |")
            lines += [f"| {row['label']} | {row['failed']} | |" for row in found if "failed" in row]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument("--only", default="", help="cases in whose name this regular expression is found")
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="read rows that begin anywhere one element at a time, for comparison"
    )
    parser.add_argument("--seconds", type=float, default=0.03, help="about so long for each timing")
    parser.add_argument("--budget-s", type=float, default=540, help="start no case after so many seconds")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "launch_sweep.json", help="the JSON file; the table goes beside it"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU")
    one_at_a_time(arguments.one_at_a_time)
    found = [
        trial
        for case in CASES
        if re.search(arguments.only, case.name)
        for kernel in PASSES
        if arguments.kernel in kernel
        for trial in trials(kernel, case)
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = sweep(found, arguments.output, arguments.seconds, arguments.budget_s, arguments.one_at_a_time)
    text = table(results)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
