"""The full study on whatever device is there: `python -m bench.study`.

Every case is a shape and dtype; every way of computing a loss on it is first checked against the reference in fp64 on some of
its rows, then timed (forward without gradient, and training step), beside a copy of the same logits. Results go to a JSON file
after each, the most important first; a second call goes on with what is missing. See bench/README.md.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dm import dm_loss, edf, reference

RESULTS = Path(__file__).parent / "results"
DM = edf.DM(beta=8, lambd=0.5)
QUANTILES = (0.2, 0.5, 0.8)
GPU = torch.cuda.is_available()


# ---- Cases


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    dtype: str
    # A figure is promised: there are the ways that take long to compile, and launches are counted.
    promised: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.classes} {self.dtype}"

    @property
    def bytes(self) -> int:
        """T: one pass over the logits."""
        return self.rows * self.classes * getattr(torch, self.dtype).itemsize


def cases() -> list[Case]:
    """All shapes, the most important first."""
    promised = [(8192, 32000), (8192, 128256), (8192, 262144), (4096, 1000), (32768, 256), (16, 10_000_000)]
    models = [(8192, classes) for classes in (50304, 102400, 152064, 201088)] + [(64, 1_000_000)]
    rows = [(rows, 128256) for rows in (1024, 2048, 4096, 16384, 32768)]
    few_classes = [(32768, 1 << power) for power in range(8, 17)]
    small = [(rows, classes) for rows in (128, 256, 1024, 4096) for classes in (10, 100, 1000, 10000, 21841)]
    found = [Case(*shape, "bfloat16", promised=True) for shape in promised]
    found += [Case(*shape, "bfloat16") for shape in models + rows + few_classes]
    found += [Case(*shape, "float32") for shape in promised + models[:1] + rows[:2]]
    found += [Case(*shape, dtype) for dtype in ("bfloat16", "float32") for shape in small]
    found += [Case(*shape, "float32") for shape in few_classes]
    return list({case.name: case for case in found}.values())


QUICK = [Case(64, 1000, "bfloat16"), Case(64, 1000, "float32"), Case(16, 5003, "bfloat16")]


def batch(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Logits whose margins are uniform in +-6, so that p spreads over (0, 1)."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(case.rows, case.classes, dtype=getattr(torch, case.dtype), device=device)
    target = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    wanted = torch.rand(case.rows, generator=generator, device=device) * 12 - 6
    height = max(1, (1 << 27) // case.classes)
    for start in range(0, case.rows, height):
        part = slice(start, start + height)
        some = torch.randn(logits[part].shape, generator=generator, device=device)
        label = target[part, None]
        lse = some.scatter_(1, label, -math.inf).logsumexp(1)
        logits[part] = some.scatter_(1, label, (lse + wanted[part])[:, None])
    return logits, target


# ---- Ways to compute a loss

# Cases that are compiled together.
GROUP = 16
# Ways that compile nothing.
READY = ("F.cross_entropy", "weighted F.cross_entropy", "reference")


class _Fresh(torch.autograd.Function):
    """A copy of the logits for a loss that overwrites them; the gradient passes through without another."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> Tensor:
        return dlogits


@dataclass(frozen=True)
class Way:
    """A loss of (logits, target). `truth` says what it computes: DM under its sum of weights, DM / N, or mean cross entropy."""

    loss: Callable[[Tensor, Tensor], Tensor]
    truth: str
    # Passes over the logits that the task needs: the limit is their bytes at the rate of a copy.
    forward: int = 1
    step: int = 3
    ours: bool = False
    overwrites: bool = False


def _weighted(cross_entropy: Tensor, p: Tensor) -> Tensor:
    weight = DM.weight(p).detach()
    return (weight / (2 * (1 - p) + 1e-6) * cross_entropy).sum() / (weight.sum() + 1e-8)


def formula(logits: Tensor, target: Tensor) -> Tensor:
    """The definition as one writes it."""
    p = logits.detach().float().softmax(1).gather(1, target[:, None])[:, 0]
    return _weighted(F.cross_entropy(logits.float(), target, reduction="none"), p)


def weighted_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """torch's cross entropy in the logits' dtype, times a detached weight."""
    cross_entropy = F.cross_entropy(logits, target, reduction="none").float()
    return _weighted(cross_entropy, torch.exp(-cross_entropy.detach()))


def _import(module: str, name: str) -> Any:
    """The name in a module of another package; None, and a line that says so, where it cannot be had."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"no {module}.{name}: {error}", flush=True)
        return None


@cache
def rivals() -> dict[str, Way]:
    """Plain mean cross entropy, of other packages too where they are installed: less work than DM, which has weights."""
    found = {"F.cross_entropy": Way(F.cross_entropy, "mean cross entropy")}
    if not GPU:
        return found
    if liger := _import("liger_kernel.transformers", "LigerCrossEntropyLoss"):
        found["Liger"] = Way(liger(), "mean cross entropy", overwrites=True)
    if quack := _import("quack.cross_entropy", "cross_entropy"):
        found["QuACK"] = Way(lambda z, y: quack(z, y, reduction="mean"), "mean cross entropy")
    if flash := _import("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss"):
        found["flash-attn"] = Way(lambda z, y: flash(z, y)[0].mean(), "mean cross entropy")
    return found


def ways(case: Case) -> dict[str, Way]:
    rows = case.rows

    def known(z: Tensor, y: Tensor) -> Tensor:
        return dm_loss(z, y, DM, reduction="sum", normalizer=float(rows))

    found = {
        "fused_dm": Way(lambda z, y: dm_loss(z, y, DM), "sum_weight", ours=True),
        "fused_dm, known divisor": Way(known, "normalizer", step=2, ours=True),
        "fused_dm, in place": Way(lambda z, y: dm_loss(z, y, DM, inplace=True), "sum_weight", ours=True, overwrites=True),
        **rivals(),
        "weighted F.cross_entropy": Way(weighted_cross_entropy, "sum_weight"),
        "reference": Way(lambda z, y: dm_loss(z, y, DM, impl="reference"), "sum_weight"),
    }
    if case.promised:
        found["formula, compiled"] = Way(torch.compile(formula, dynamic=False), "sum_weight")
        found["weighted F.cross_entropy, compiled"] = Way(torch.compile(weighted_cross_entropy, dynamic=False), "sum_weight")
    return found


# ---- The check before the timing


@torch.no_grad()
def exact_divisor(logits: Tensor, target: Tensor) -> float:
    """1e-8 plus the sum of weights in fp64, some rows at a time."""
    total = 1e-8
    height = max(1, (1 << 25) // logits.shape[1])
    for start in range(0, logits.shape[0], height):
        margin = reference.margin(logits[start : start + height].double(), target[start : start + height], -100)
        total += DM.log_weight(F.logsigmoid(margin), F.logsigmoid(-margin)).exp().sum().item()
    return total


def check(way: Way, logits: Tensor, target: Tensor, divisor: float, truths: dict[Any, Any] | None = None) -> float:
    """The largest error of the gradient on some rows as a share of the bound of tests/tolerance.py.

    The bound for those rows takes the divisor as given. That of the batch is compared with its exact value, by which it may be
    off as far as the worst of these rows' weights: a weighted mean of errors is at most the largest. `truths` keeps what has
    been computed for other ways of the same batch.
    """
    from tolerance import expected, share_of_bound

    rows, classes = logits.shape
    few = torch.linspace(rows - 1, 0, max(1, min(4, (1 << 23) // classes))).long().unique().to(logits.device)
    truths = {} if truths is None else truths

    def truth_for(emphasis: Any, **options: Any) -> Any:
        key = (type(emphasis), *options.values())
        if key not in truths:
            truths[key] = expected(logits[few], target[few], emphasis, **options)
        return truths[key]

    options: dict[str, Any] = {"reduction": "sum", "normalizer": float(rows)}
    emphasis: Any = edf.CCE() if way.truth == "mean cross entropy" else DM
    share = 0.0
    if way.truth == "sum_weight":
        options["normalizer"] = divisor
    if way.ours and way.truth == "sum_weight":
        with torch.no_grad():
            output = dm_loss(logits, target, DM, return_output=True)
        options["normalizer"] = output.sum_weight.item()
        truth = truth_for(emphasis, **options)
        share = abs(output.sum_weight.item() / divisor - 1)
        share /= (truth.allowed["example_weight"] / truth.example_weight.abs()).max().item()
    leaf = logits.detach().requires_grad_()
    way.loss(_Fresh.apply(leaf) if way.overwrites else leaf, target).backward()
    truth = truth_for(emphasis, **options)
    return max(share, share_of_bound(leaf.grad[few], truth.dlogits, truth.allowed["dlogits"]).max().item())


# ---- Measuring


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def host_ms(prepare: Callable[[], Any], run: Callable[[Any], None]) -> float:
    """Milliseconds until `run` returns: on a GPU, what it takes to put the work there."""
    found = []
    for _ in range(3):
        given = prepare()
        _synchronize()
        start = time.perf_counter()
        run(given)
        found.append(1e3 * (time.perf_counter() - start))
    _synchronize()
    return statistics.median(found)


def times(prepare: Callable[[], Any], run: Callable[[Any], None], seconds: float) -> list[float]:
    """Milliseconds of `run(prepare())`, at least five, for about so many seconds in all; only `run` is timed.

    On a GPU: by events, after L2 has been overwritten and the device been held up long enough for the host to be ahead of it.
    """
    run(prepare())
    host = host_ms(prepare, run)
    start = time.perf_counter()
    run(prepare())
    _synchronize()
    repeats = max(5, min(50, int(seconds / (time.perf_counter() - start + 2e-3))))
    if not GPU:
        found = []
        for _ in range(repeats):
            given = prepare()
            start = time.perf_counter()
            run(given)
            found.append(1e3 * (time.perf_counter() - start))
        return found
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(repeats):
        given = prepare()
        flush.zero_()
        # Twice as long as the host needs, at a clock of at most 2 GHz.
        torch.cuda._sleep(int(1_000_000 + 4e6 * host))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(given)
        end.record()
        events.append((begin, end))
        del given
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def peak_mib(prepare: Callable[[], Any], run: Callable[[Any], None]) -> float | None:
    """What `run` allocates at its peak beyond what was there before; None where it cannot be measured."""
    given = prepare()
    gc.collect()
    if GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(given)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = status("VmRSS")
    clear.write_text("5")
    run(given)
    return (status("VmHWM") - before) / 2**10


def launches(prepare: Callable[[], Any], run: Callable[[Any], None]) -> int | None:
    """Kernels, copies and fills that `run` puts on the GPU; None without one."""
    if not GPU:
        return None
    given = prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run(given)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def spread(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    at = {f"q{round(100 * q)}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}
    return {**at, "q50": statistics.median(ordered), "repeats": len(ordered)}


def measure(
    way: Way, case: Case, logits: Tensor, target: Tensor, divisor: float, seconds: float, truths: dict[Any, Any] | None = None
) -> dict[str, Any]:
    """Check, then time. An implementation of ours that fails its check is not timed."""
    start = time.perf_counter()
    share = check(way, logits, target, divisor, truths)
    checked = time.perf_counter()
    found: dict[str, Any] = {"error_share": share, "truth": way.truth}
    if way.ours and not share <= 1:
        return {**found, "failed": f"its error is {share:.3g} times the bound", "ours": True}
    leaf = logits.detach().requires_grad_()

    def prepare() -> Tensor:
        leaf.grad = None
        return _Fresh.apply(leaf) if way.overwrites else leaf

    def step(given: Tensor) -> None:
        way.loss(given, target).backward()

    def forward(given: Tensor) -> None:
        with torch.no_grad():
            way.loss(given, target)

    found["forward_ms"] = spread(times(lambda: logits.clone() if way.overwrites else logits, forward, seconds))
    found["step_ms"] = spread(times(prepare, step, seconds))
    found["host_ms"] = host_ms(prepare, step)
    found["peak_extra_mib"] = peak_mib(prepare, step)
    # The profiler takes longer than the timing.
    timed = time.perf_counter()
    found["launches"] = launches(prepare, step) if case.promised else None
    found["seconds"] = {"check": checked - start, "timing": timed - checked, "launches": time.perf_counter() - timed}
    found |= {"forward_bytes": way.forward * case.bytes, "step_bytes": way.step * case.bytes}
    leaf.grad = None
    return found


def copy(logits: Tensor, seconds: float) -> dict[str, Any]:
    out = torch.empty_like(logits)
    return {"copy_ms": spread(times(lambda: out, lambda given: given.copy_(logits), seconds)), "copy_bytes": 2 * logits.nbytes}


# ---- Compiling before measuring


def compile_way(case: Case, name: str) -> None:
    """Leave the kernels of a way in the caches on disk: run it once, on logits of nothing in particular."""
    torch.set_num_threads(1)
    # What fails, or finds no memory beside the other processes, is compiled or reported when it is measured.
    with contextlib.suppress(Exception):
        way = ways(case)[name]
        logits = torch.zeros(case.rows, case.classes, dtype=getattr(torch, case.dtype), device="cuda").requires_grad_()
        target = torch.zeros(case.rows, dtype=torch.int64, device="cuda")
        way.loss(_Fresh.apply(logits) if way.overwrites else logits, target).backward()
        torch.cuda.synchronize()
        del logits
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def compile_all(missing: list[tuple[Case, str]], pool: ProcessPoolExecutor) -> None:
    """Compile what is going to be measured; the processes of the pool do nothing afterwards."""
    start = time.perf_counter()
    try:
        for done in [pool.submit(compile_way, *pair) for pair in missing]:
            done.result()
    except BrokenProcessPool as error:
        # A compiler that crashed: what is left is compiled when it is measured.
        print(f"compiling beforehand ended early: {error}", flush=True)
    print(f"{len(missing)} ways compiled beforehand in {time.perf_counter() - start:.0f} s", flush=True)


# ---- The study


def machine() -> dict[str, Any]:
    from fused_dm._environment import environment

    found = environment()
    device = (
        torch.cuda.get_device_name()
        if GPU
        else next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
    )
    versions = {name: found[name] for name in ("fused_dm", "torch", "triton", "python")}
    return {"device": device, "cores": None if GPU else os.cpu_count(), "versions": versions}


def load(path: Path) -> dict[str, Any]:
    fresh = {**machine(), "commands": [], "load_averages": [], "cases": {}}
    if not path.exists():
        return fresh
    found = json.loads(path.read_text())
    for field in ("device", "versions"):
        if found[field] != fresh[field]:
            raise ValueError(f"{path}: expected results of {field} {fresh[field]}, got {found[field]}; give another --output")
    return found


def study(chosen: list[Case], path: Path, budget: float, seconds: float, processes: int = 0) -> list[str]:
    """Measure what `path` lacks until the budget of seconds is spent; the names of what is left.

    What is to be measured is compiled before it, some cases at a time, in so many processes.
    """
    start = time.perf_counter()
    found = load(path)
    pool = ProcessPoolExecutor(processes, get_context("spawn")) if processes else None
    rivals()
    # What has been imported stays: a look at all of it after every way takes longer than the timing.
    gc.collect()
    gc.freeze()
    found["commands"].append(f"python -m bench.study {' '.join(sys.argv[1:])}".strip())
    left = []
    for number, case in enumerate(chosen):
        if pool and number % GROUP == 0 and time.perf_counter() - start < budget:
            done = {name: case["ways"] for name, case in found["cases"].items()}
            group = [(case, name) for case in chosen[number : number + GROUP] for name in ways(case) if name not in READY]
            compile_all([(case, name) for case, name in group if name not in done.get(case.name, {})], pool)
        results = found["cases"].setdefault(
            case.name, {"rows": case.rows, "classes": case.classes, "dtype": case.dtype, "ways": {}}
        )
        missing = {name: way for name, way in ways(case).items() if name not in results["ways"]}
        if not missing:
            continue
        if time.perf_counter() - start > budget:
            left += [f"{case.name}: {name}" for name in missing]
            continue
        logits, target = batch(case, "cuda" if GPU else "cpu")
        divisor = exact_divisor(logits, target)
        truths: dict[Any, Any] = {}
        if "copy_ms" not in results:
            results |= copy(logits, seconds)
            found["cases"][case.name] = results
        for name, way in missing.items():
            if time.perf_counter() - start > budget:
                left.append(f"{case.name}: {name}")
                continue
            try:
                results["ways"][name] = measure(way, case, logits, target, divisor, seconds, truths)
            except torch.OutOfMemoryError:
                results["ways"][name] = {"failed": "out of memory"}
            except Exception as error:
                # A rival that does not take a shape, or a bug of ours, costs its own figures and no others.
                message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0][:200]
                results["ways"][name] = {"failed": f"{type(error).__name__}: {message}", "ours": way.ours}
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{time.perf_counter() - start:6.1f} s  {case.name}: {name}: {summary(results['ways'][name])}", flush=True)
        del logits, target
        if case.promised:
            # Or the sixth case would reach the limit of graphs for a function, and be run uncompiled.
            torch._dynamo.reset()
    if pool:
        pool.shutdown()
    found["load_averages"].append(round(os.getloadavg()[0], 1))
    path.write_text(json.dumps(found, indent=1) + "\n")
    return left


def summary(result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"]
    took = " + ".join(f"{seconds:.1f}" for seconds in result["seconds"].values())
    return f"forward {result['forward_ms']['q50']:.3f} ms, step {result['step_ms']['q50']:.3f} ms; took {took} s"


def share_of_limit(case: dict[str, Any], result: dict[str, Any], part: str) -> float:
    """The time that the bytes take at the rate of the copy, as a share of the time it took."""
    rate = case["copy_bytes"] / case["copy_ms"]["q50"]
    return result[f"{part}_bytes"] / rate / result[f"{part}_ms"]["q50"]


def table(found: dict[str, Any]) -> str:
    where = f"{found['cores']} cores" if found["cores"] else "GPU"
    loads = f" Load average: {', '.join(map(str, found['load_averages']))}." if found["cores"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['device']}, {where}; {versions}.{loads}", "", *(f"    {command}" for command in found["commands"])]
    for name, case in found["cases"].items():
        if "copy_ms" not in case:
            continue
        rate = case["copy_bytes"] / case["copy_ms"]["q50"] / 1e6
        lines += [
            "",
            f"### {name}",
            "",
            f"T = {case['copy_bytes'] / 2e6:.1f} MB; a copy runs at {rate:.0f} GB/s.",
            "",
            "| way | forward, ms | of the limit | step, ms | 20 % - 80 % | of the limit | host, ms | MiB | launches | error |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for way, result in case["ways"].items():
            if "failed" in result:
                lines.append(f"| {way} | {result['failed']} | | | | | | | | |")
                continue
            forward, step, peak = result["forward_ms"], result["step_ms"], result["peak_extra_mib"]
            cells = [way, f"{forward['q50']:.3f}", f"{share_of_limit(case, result, 'forward'):.2f}", f"{step['q50']:.3f}"]
            cells += [f"{step['q20']:.3f} - {step['q80']:.3f}", f"{share_of_limit(case, result, 'step'):.2f}"]
            cells += [f"{result['host_ms']:.3f}"]
            cells += ["" if peak is None else f"{peak:.1f}", "" if result["launches"] is None else str(result["launches"])]
            cells.append(f"{result['error_share']:.2g}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Time, share of the limit and memory of a training step, against V at the commonest N and against N at the commonest V."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    done = [case for case in found["cases"].values() if case["ways"] and case["dtype"] == "bfloat16"]
    figures: list[tuple[str, Callable[[dict, dict], float | None]]] = [
        ("step, ms", lambda case, result: result["step_ms"]["q50"]),
        ("share of the limit", lambda case, result: share_of_limit(case, result, "step")),
        ("peak beyond the logits, MiB", lambda case, result: result["peak_extra_mib"]),
    ]
    fig, axes = plt.subplots(2, 3, figsize=(16, 9), constrained_layout=True)
    for line, (along, fixed) in zip(axes, (("classes", "rows"), ("rows", "classes")), strict=True):
        values = [case[fixed] for case in done]
        at = max(set(values), key=lambda value: (values.count(value), value))
        some = sorted((case for case in done if case[fixed] == at), key=lambda case: case[along])
        for axis, (label, value) in zip(line, figures, strict=True):
            for way in dict.fromkeys(way for case in some for way in case["ways"]):
                with_way = [case for case in some if "step_ms" in case["ways"].get(way, {})]
                axis.plot(
                    [case[along] for case in with_way],
                    [value(case, case["ways"][way]) for case in with_way],
                    "o-" if way.startswith("fused_dm") else "x--",
                    label=way,
                )
            axis.set(xscale="log", xlabel=f"{along} ({at} {fixed})", ylabel=label)
            axis.set_yscale("linear" if label.startswith("share") else "symlog" if label.startswith("peak") else "log")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    fig.suptitle(f"A training step in bf16 on {found['device']}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=540, help="start nothing new after so many seconds")
    parser.add_argument("--seconds", type=float, default=0.15, help="about so long for each timing")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(12, len(os.sched_getaffinity(0))) if GPU else 0,
        help="that compile beforehand; 0: each way is compiled when its turn comes",
    )
    parser.add_argument("--quick", action="store_true", help="three small cases: shows that the study runs")
    parser.add_argument(
        "--only", default="", help="cases in whose name this regular expression is found, such as 'bfloat16' or '^8192 x'"
    )
    parser.add_argument("--threads", type=int, help="torch.set_num_threads, on a CPU")
    parser.add_argument("--output", type=Path, help="the JSON file; table and plots go beside it")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.output or RESULTS / f"study-{'gpu' if GPU else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in (QUICK if arguments.quick else cases()) if re.search(arguments.only, case.name)]
    if not chosen:
        parser.error(f"--only: expected what is found in a case's name, got {arguments.only!r}")
    left = study(chosen, path, arguments.budget_s, 0.05 if arguments.quick else arguments.seconds, arguments.processes)
    found = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(found))
    if any(case["ways"] and case["dtype"] == "bfloat16" for case in found["cases"].values()):
        if importlib.util.find_spec("matplotlib"):
            plot(found, path.with_suffix(".png"))
        else:
            print("matplotlib is not installed: no plots; call again where it is")
    failed = [
        f"{case}: {way}" for case, of in found["cases"].items() for way, result in of["ways"].items() if result.get("ours")
    ]
    for name in failed:
        print(f"FAILED: {name}")
    print(f"{len(left)} timings left" + (": call again with the same --output" if left else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
