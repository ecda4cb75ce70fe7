"""The CPU implementation beside torch's cross entropy: `python -m bench.cpu`.

A training step is forward and backward on fresh gradients. Both sides run in turn in one process, and the table gives the
median of each and their ratio. The allocator is glibc's own ("default"), which gives large buffers back to the system after
every step, so that much of the time is page faults; or the same told to keep them ("warm heap"). Peak memory is what a
step adds to the resident set, less the gradient.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHAPES = [(1024, 32000), (512, 128256)]
DTYPES = ["float32", "bfloat16", "float16"]
WARM = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def batch(rows: int, classes: int, dtype: str):
    """Logits whose label probabilities spread over (0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    lse = logits.logsumexp(1)
    logits.scatter_(1, target[:, None], (lse + torch.empty(rows).uniform_(-6, 6, generator=generator))[:, None])
    return logits.to(getattr(torch, dtype)), target


def steps(logits, target):
    import torch

    from fused_dm import dm_loss, edf

    emphasis = edf.DM(beta=8, lambd=0.5)

    def ours():
        leaf = logits.detach().requires_grad_()
        dm_loss(leaf, target, emphasis).backward()

    def theirs():
        leaf = logits.detach().requires_grad_()
        torch.nn.functional.cross_entropy(leaf, target).backward()

    return ours, theirs


def time_case(rows: int, classes: int, dtype: str, threads: int, repeats: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    ours, theirs = steps(*batch(rows, classes, dtype))
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(-2, repeats):
        for name, step in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            step()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": rows,
        "classes": classes,
        "dtype": dtype,
        "threads": threads,
        "seconds": seconds,
        "median_ms": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "ratio": round(medians["ours"] / medians["theirs"], 3),
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}")


def memory_case(rows: int, classes: int, dtype: str) -> dict:
    logits, target = batch(rows, classes, dtype)
    steps(logits[:2], target[:2])[0]()
    ours, _ = steps(logits, target)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ours()
    gradient = logits.numel() * logits.element_size()
    return {
        "rows": rows,
        "classes": classes,
        "dtype": dtype,
        "peak_extra_mib": round((_status("VmHWM") - before) / 2**20, 1),
        "gradient_mib": round(gradient / 2**20, 1),
    }


def _in_a_process(command: list[str], environment: dict[str, str] | None = None) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cpu", *command],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["time", "memory"], help="run one part and print JSON (used by the whole)")
    arguments = parser.parse_args()
    if arguments.part == "time":
        cases = [(*shape, dtype, threads) for threads in arguments.threads for shape in SHAPES for dtype in DTYPES]
        print(json.dumps([time_case(*case, arguments.repeats) for case in cases]))
        return
    if arguments.part == "memory":
        print(json.dumps([memory_case(*shape, dtype) for shape in SHAPES for dtype in DTYPES]))
        return

    import torch

    options = ["--part", "time", "--repeats", str(arguments.repeats), "--threads", *map(str, arguments.threads)]
    found = {
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "command": "python -m bench.cpu",
        "repeats": arguments.repeats,
        "default": _in_a_process(options),
        "warm heap": _in_a_process(options, WARM),
        "memory": _in_a_process(["--part", "memory"]),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        f"torch {found['torch']}, {found['processor']}, {found['cores']} cores, medians of {arguments.repeats}; "
        "`python -m bench.cpu`",
        "",
        "| allocator | threads | rows x classes | dtype | fused_dm, ms | cross entropy, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for allocator in ("default", "warm heap"):
        for row in found[allocator]:
            ours, theirs = row["median_ms"]["ours"], row["median_ms"]["theirs"]
            shape = f"{row['rows']} x {row['classes']}"
            lines.append(f"| {allocator} | {row['threads']} | {shape} | {row['dtype']} | {ours} | {theirs} | {row['ratio']} |")
    lines += ["", "| rows x classes | dtype | gradient, MiB | peak beyond it, MiB |", "|---|---|---|---|"]
    for row in found["memory"]:
        beyond = round(row["peak_extra_mib"] - row["gradient_mib"], 1)
        lines.append(f"| {row['rows']} x {row['classes']} | {row['dtype']} | {row['gradient_mib']} | {beyond} |")
    text = "\n".join(lines) + "\n"
    (arguments.output / "cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
