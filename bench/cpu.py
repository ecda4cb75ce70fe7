"""The CPU implementation beside torch's cross entropy: `python -m bench.cpu`.

A training step is forward and backward on fresh gradients. Both sides run in turn in one process, each first every other time,
and the table gives the median of each and the median of the ratios of neighbouring steps, which suffers less from whatever
else the machine does. The load average is recorded. The allocator is glibc's own ("default"), which gives large buffers back
to the system after every step, so that much of the time is page faults; or the same told to keep them ("warm heap"). Where
buffers have less than 32 MiB, chance decides when a process starts whether its heap keeps them, so that the steps of several
processes are pooled. Peak memory is what a step adds to the resident set, less the gradient.

The small shapes are also timed as losses are often called: with ignored rows, class weights or weights of the examples. There
cross entropy gets the same labels and class weights, and for want of weights of the examples an average in torch.

`--sweep` times fused_dm alone over block sizes instead.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# N, V and spatial dimensions, the small ones first.
SHAPES = [(4096, 1000), (8, 21, 256, 256), (1024, 32000), (512, 128256), (32, 1000000)]
DTYPES = ["float32", "bfloat16"]
ALLOCATORS = {"default": {}, "warm heap": {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}}
# Whatever is of the order of the rows weighs most where there are few classes.
CALLS = ["2 % ignored", "class weights", "example weights"]
BLOCKS = [1 << power for power in range(15, 23)]


def batch(shape: tuple[int, ...], dtype: str):
    """Logits whose label probabilities spread over (0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    margins = torch.empty(target.shape).uniform_(-6, 6, generator=generator)
    logits.scatter_(1, target[:, None], (logits.logsumexp(1) + margins)[:, None])
    return logits.to(getattr(torch, dtype)), target


def steps(logits, target, call: str = "plain") -> dict[str, Callable[[], None]]:
    import torch

    from fused_dm import dm_loss, edf

    emphasis = edf.DM(beta=8, lambd=0.5)
    generator = torch.Generator().manual_seed(1)
    weight = sample_weight = None
    if call == "2 % ignored":
        target = torch.where(torch.rand(target.shape, generator=generator) < 0.02, -100, target)
    elif call == "class weights":
        weight = (torch.rand(logits.shape[1], generator=generator) + 0.5).to(logits.dtype)
    elif call == "example weights":
        sample_weight = torch.rand(target.shape, generator=generator) + 0.5

    def ours():
        leaf = logits.detach().requires_grad_()
        dm_loss(leaf, target, emphasis, weight=weight, sample_weight=sample_weight).backward()

    def theirs():
        leaf = logits.detach().requires_grad_()
        if sample_weight is None:
            loss = torch.nn.functional.cross_entropy(leaf, target, weight=weight)
        else:
            by_row = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
            loss = (by_row * sample_weight).sum() / sample_weight.sum()
        loss.backward()

    return {"ours": ours, "theirs": theirs}


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_case(shape: tuple[int, ...], dtype: str, threads: int, repeats: int, call: str = "plain") -> dict:
    import torch

    torch.set_num_threads(threads)
    both = steps(*batch(shape, dtype), call)
    if math.prod(shape) < 1 << 24:
        repeats *= 4
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(-2, repeats):
        for name in sorted(both, reverse=repeat % 2 == 1):
            took = _seconds(both[name])
            if repeat >= 0:
                seconds[name].append(took)
    return {
        "shape": shape,
        "dtype": dtype,
        "threads": threads,
        "call": call,
        "seconds": seconds,
        "load_average": round(os.getloadavg()[0], 1),
    }


def pooled(processes: list[dict]) -> dict:
    """The case that several processes have timed, with medians over the steps of all."""
    seconds = {name: [took for found in processes for took in found["seconds"][name]] for name in ("ours", "theirs")}
    ratios = sorted(ours / theirs for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True))
    return {
        **processes[0],
        "seconds": [found["seconds"] for found in processes],
        "median_ms": {name: round(1e3 * statistics.median(values), 1) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "load_average": max(found["load_average"] for found in processes),
    }


def sweep_case(shape: tuple[int, ...], dtype: str, threads: int, repeats: int) -> dict:
    """Median milliseconds by the number of elements in a block."""
    import torch

    from fused_dm import _cpu

    torch.set_num_threads(threads)
    ours = steps(*batch(shape, dtype))["ours"]
    seconds: dict[int, list[float]] = {elements: [] for elements in BLOCKS}
    for repeat in range(-1, repeats):
        for elements in BLOCKS:
            _cpu.BLOCK_ELEMENTS = elements
            took = _seconds(ours)
            if repeat >= 0:
                seconds[elements].append(took)
    return {
        "shape": shape,
        "dtype": dtype,
        "threads": threads,
        "median_ms": {str(elements): round(1e3 * statistics.median(values), 1) for elements, values in seconds.items()},
        "load_average": round(os.getloadavg()[0], 1),
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}")


def memory_case(shape: tuple[int, ...], dtype: str) -> dict:
    logits, target = batch(shape, dtype)
    steps(logits[:2], target[:2])["ours"]()
    ours = steps(logits, target)["ours"]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ours()
    return {
        "shape": shape,
        "dtype": dtype,
        "peak_extra_mib": round((_status("VmHWM") - before) / 2**20, 1),
        "gradient_mib": round(logits.numel() * logits.element_size() / 2**20, 1),
    }


def _in_a_process(part: str, case: dict, environment: dict[str, str] | None = None) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cpu", "--part", part, "--case", json.dumps(case)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _name(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _cells(row: dict) -> list[str]:
    quartiles = " - ".join(map(str, row["ratio_quartiles"]))
    return [
        str(cell)
        for cell in (row["threads"], _name(row["shape"]), row["dtype"], *row["median_ms"].values(), row["ratio"], quartiles)
    ]


def table(found: dict) -> str:
    loads = [row["load_average"] for rows in (*found["time"].values(), found["calls"]) for row in rows]
    lines = [
        f"torch {found['torch']}, {found['processor']}, {found['cores']} cores, {found['date']}; `{found['command']}`. "
        f"Load average while it ran: {min(loads)} to {max(loads)}"
        + (", so that the cores were shared with other processes." if max(loads) > found["cores"] + 0.5 else "."),
        "",
        "| allocator | threads | shape | dtype | fused_dm, ms | cross entropy, ms | ratio | its quartiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for allocator, rows in found["time"].items():
        for row in rows:
            lines.append(f"| {allocator} | {' | '.join(_cells(row))} |")
    lines += [
        "",
        "| call | threads | shape | dtype | fused_dm, ms | cross entropy, ms | ratio | its quartiles |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["calls"]:
        lines.append(f"| {row['call']} | {' | '.join(_cells(row))} |")
    lines += ["", "| shape | dtype | gradient, MiB | peak beyond it, MiB |", "|---|---|---|---|"]
    for row in found["memory"]:
        beyond = round(row["peak_extra_mib"] - row["gradient_mib"], 1)
        lines.append(f"| {_name(row['shape'])} | {row['dtype']} | {row['gradient_mib']} | {beyond} |")
    return "\n".join(lines) + "\n"


def sweep_table(found: dict) -> str:
    lines = [
        f"torch {found['torch']}, {found['processor']}, {found['cores']} cores, {found['date']}; `{found['command']}`. "
        "Median ms of a step by elements a block.",
        "",
        "| shape | dtype | threads | load | " + " | ".join(f"2^{size.bit_length() - 1}" for size in BLOCKS) + " |",
        "|---|---|---|---|" + "---|" * len(BLOCKS),
    ]
    for row in found["sweep"]:
        cells = [_name(row["shape"]), row["dtype"], row["threads"], row["load_average"], *row["median_ms"].values()]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=5, help="steps of each side in a process; four times as many for small shapes"
    )
    parser.add_argument("--processes", type=int, default=5, help="that time each case, one after another")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--sweep", action="store_true", help="time block sizes instead")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["time", "memory", "sweep"], help="run one case and print JSON (used by the whole)")
    parser.add_argument("--case", type=json.loads)
    arguments = parser.parse_args()
    if arguments.part:
        case = {**arguments.case, "shape": tuple(arguments.case["shape"])}
        print(json.dumps({"time": time_case, "memory": memory_case, "sweep": sweep_case}[arguments.part](**case)))
        return

    import torch

    cases = [{"shape": shape, "dtype": dtype} for shape in SHAPES for dtype in arguments.dtypes]
    timed = [{**case, "threads": threads, "repeats": arguments.repeats} for threads in arguments.threads for case in cases]
    how = f"--repeats {arguments.repeats}" + (" --sweep" if arguments.sweep else f" --processes {arguments.processes}")
    found: dict = {
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m bench.cpu {how}",
        "repeats": arguments.repeats,
        "time": {},
        "calls": [],
        "memory": [],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "cpu_blocks" if arguments.sweep else "cpu"

    def save() -> None:
        (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (arguments.output / f"{name}.md").write_text(sweep_table(found) if arguments.sweep else table(found))

    def time_in_processes(case: dict, environment: dict[str, str]) -> dict:
        return pooled([_in_a_process("time", case, environment) for _ in range(arguments.processes)])

    if arguments.sweep:
        found["sweep"] = []
        for case in (case for case in timed if case["shape"] in SHAPES[:3]):
            found["sweep"].append(_in_a_process("sweep", case))
            save()
    else:
        for allocator, environment in ALLOCATORS.items():
            found["time"][allocator] = []
            for case in timed:
                found["time"][allocator].append(time_in_processes(case, environment))
                save()
        few = [case for case in timed if case["shape"] in SHAPES[:2] and case["threads"] == max(arguments.threads)]
        for case in ({**case, "call": call} for call in CALLS for case in few):
            found["calls"].append(time_in_processes(case, {}))
            save()
        found["memory"] = [_in_a_process("memory", case) for case in cases]
        save()
    print((arguments.output / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
