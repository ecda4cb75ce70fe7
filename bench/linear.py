"""The last layer and the loss together beside torch: `python -m bench.linear`.

A training step is forward and backward on fresh gradients of input and weight. On a CPU the rivals are `F.linear` with
`F.cross_entropy`, which materialise the logits, and `F.linear_cross_entropy` with its default options. All sides of a case
run in turn in one process. Besides wall time the table gives the processor time of the process, which a busy machine does not
lengthen much. Peak memory is what a step adds to the resident set, less the gradients, in a process
of its own. On a GPU the step is timed beside its three bare matrix products, and beside Liger's where that is installed.

`accuracy` is the root mean square error of the 16-bit gradients against fp64, as a share of that of the unfused computation.
`sparse` is a batch of which a share is fitted, with the backward that leaves such rows out.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.cpu import ALLOCATORS, RESULTS, _processor, _status

CPU_SHAPES = [(512, 256, 30522), (1024, 256, 30522), (512, 256, 128256), (1024, 256, 128256)]
GPU_SHAPES = [(8192, 4096, 128256), (8192, 2048, 248320), (8192, 2048, 128256)]
LARGE = (8192, 2048, 128256)  # in bf16, for its memory alone
MAX_LOGITS_BYTES = 512 * 2**20  # of "bounded"
TOLERANCE = 1e-3
SHARES = (0.0, 0.5, 0.8, 0.95)


def batch(rows: int, features: int, classes: int, fitted: float = 0.5, device: str = "cpu", dtype: str = "float32"):
    """Input, weight and labels. Of the rows, a share `fitted` lies along its label's weight, so that p is near 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, features, generator=generator) / features**0.5
    target = torch.randint(classes, (rows,), generator=generator)
    given = torch.randn(rows, features, generator=generator)
    known = int(fitted * rows)
    given[:known] += 40 * weight[target[:known]]
    return [tensor.to(device, getattr(torch, dtype)) for tensor in (given, weight)] + [target.to(device)]


def steps(given, weight, target) -> dict:
    """A training step of each side, and the three products of it."""
    import torch
    import torch.nn.functional as F

    from fused_dm import linear_dm_loss

    given, weight = given.requires_grad_(), weight.requires_grad_()

    def step(loss):
        def run():
            given.grad = weight.grad = None
            loss().backward()

        return run

    def products():
        with torch.no_grad():
            logits = given @ weight.t()
            logits @ weight
            logits.t() @ given

    found = {
        "ours": step(lambda: linear_dm_loss(given, weight, target, "cce", reduction="mean")),
        "recompute": step(lambda: linear_dm_loss(given, weight, target, "cce", reduction="mean", recompute=True)),
        "bounded": step(
            lambda: linear_dm_loss(given, weight, target, "cce", reduction="mean", max_logits_bytes=MAX_LOGITS_BYTES)
        ),
        "unfused": step(lambda: F.cross_entropy(F.linear(given, weight), target)),
        "products": products,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["chunked"] = step(lambda: F.linear_cross_entropy(given, weight, target, options=options))
    if given.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = step(lambda: liger(weight, given, target))
    return found


def time_steps(runs: dict, repeats: dict[str, int], warmups: int = 1) -> dict:
    """Medians of wall and processor time of each, in turn."""
    import torch

    seconds: dict = {name: {"wall": [], "processor": []} for name in runs}
    for repeat in range(-warmups, max(repeats.values())):
        for name, run in runs.items():
            if repeat >= repeats[name] or (repeat < 0 and repeats[name] == 1):
                continue
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= 0:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["processor"].append(time.process_time() - processor)
    return {
        name: {kind: round(1e3 * statistics.median(values), 1) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def time_case(shape: tuple[int, int, int], threads: int, repeats: int, chunked: int, device: str) -> dict:
    import torch

    torch.set_num_threads(threads)
    on_gpu = device != "cpu"
    runs = steps(*batch(*shape, device=device, dtype="bfloat16" if on_gpu else "float32"))
    del runs["bounded"]
    if chunked == 0:
        runs.pop("chunked", None)
    counts = dict.fromkeys(runs, repeats) | ({"chunked": chunked} if "chunked" in runs else {})
    return {"shape": shape, "threads": threads, "median_ms": time_steps(runs, counts)}


def sparse_case(shape: tuple[int, int, int], share: float, repeats: int) -> dict:
    """With `share` of the rows fitted: the default mode, recomputation, and that with the fitted rows left out."""
    import torch

    from fused_dm import linear_dm_loss

    torch.set_num_threads(1)
    given, weight, target = batch(*shape, fitted=share)
    given, weight = given.requires_grad_(), weight.requires_grad_()
    skipped = {}

    def run(name: str, **options):
        def step():
            given.grad = weight.grad = None
            output = linear_dm_loss(given, weight, target, "cce", reduction="mean", return_output=True, **options)
            output.loss.backward()
            skipped[name] = round(output.skipped.item(), 4)

        return step

    runs = {
        "accumulated": run("accumulated"),
        "recompute": run("recompute", recompute=True),
        "sparse": run("sparse", recompute=True, skip_tolerance=TOLERANCE),
    }
    medians = time_steps(runs, dict.fromkeys(runs, repeats))
    return {"shape": shape, "fitted": share, "skipped": skipped["sparse"], "median_ms": medians}


def accuracy_case(dtype: str) -> dict:
    """Errors against fp64 of the gradients by input and weight, relative to those of the unfused computation."""
    import torch.nn.functional as F

    from fused_dm import dm_loss, edf, linear_dm_loss

    given, weight, target = batch(512, 128, 4000, dtype=dtype)
    emphasis = edf.DM(beta=8, lambd=0.5)

    def gradients(function, *tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        function(*leaves).backward()
        return [leaf.grad.double() for leaf in leaves]

    def unfused(x, w):
        return dm_loss(F.linear(x, w), target, emphasis)

    truth = gradients(unfused, given.double(), weight.double())
    sides = {
        "unfused": gradients(unfused, given, weight),
        "ours": gradients(lambda x, w: linear_dm_loss(x, w, target, emphasis), given, weight),
        "recompute": gradients(lambda x, w: linear_dm_loss(x, w, target, emphasis, recompute=True), given, weight),
    }
    errors = {
        side: [(got - exact).square().mean().sqrt().item() for got, exact in zip(found, truth, strict=True)]
        for side, found in sides.items()
    }
    ratios = {
        side: [round(error / base, 3) for error, base in zip(found, errors["unfused"], strict=True)]
        for side, found in errors.items()
    }
    return {"dtype": dtype, "rms_error": errors, "of_unfused": ratios}


def memory_case(shape: tuple[int, int, int], side: str, dtype: str) -> dict:
    given, weight, target = batch(*shape, dtype=dtype)
    steps(*batch(8, shape[1], 500, dtype=dtype))[side]()
    run = steps(given, weight, target)[side]
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    gradients = (given.numel() + weight.numel()) * given.element_size()
    beyond = round((_status("VmHWM") - before - gradients) / 2**20, 1)
    return {"shape": shape, "dtype": dtype, "side": side, "beyond_gradients_mib": beyond}


def gpu_memory_case(shape: tuple[int, int, int]) -> dict:
    import torch

    run = steps(*batch(*shape, device="cuda", dtype="bfloat16"))["ours"]
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - (shape[0] + shape[2]) * shape[1] * 2
    run()
    gradients = (shape[0] + shape[2]) * shape[1] * 2
    return {"shape": shape, "beyond_gradients_gib": round((torch.cuda.max_memory_allocated() - before - gradients) / 2**30, 3)}


def _part(command: list[str], warm: bool = False) -> dict:
    environment = {**os.environ, **ALLOCATORS["warm heap"]} if warm else dict(os.environ)
    command = [sys.executable, "-m", "bench.linear", *command]
    print(" ".join(command[2:]), file=sys.stderr, flush=True)
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def text(found: dict) -> str:
    lines = [
        f"torch {found['torch']}, {found['device']}, {found['cores']} cores, medians of {found['repeats']}, "
        f"{found['allocator']} allocator, load {found['load'][0]:.0f}; `{found['command']}`",
        "",
        "Wall time of a training step, ms (processor time in brackets), and ratios of both.",
        "",
        "| rows x features x classes | threads | linear_dm_loss | recompute | linear, cross_entropy | ratio | "
        "linear_cross_entropy | its factor | three products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(medians: dict, side: str) -> str:
        return f"{medians[side]['wall']:.0f} ({medians[side]['processor']:.0f})" if side in medians else "-"

    def ratio(medians: dict, side: str, other: str) -> str:
        if other not in medians or side not in medians:
            return "-"
        wall, processor = (medians[side][kind] / medians[other][kind] for kind in ("wall", "processor"))
        return f"{wall:.2f} ({processor:.2f})"

    for case in found["time"]:
        medians = case["median_ms"]
        shape = " x ".join(map(str, case["shape"]))
        ours, again, unfused, chunked, products = (
            cell(medians, side) for side in ("ours", "recompute", "unfused", "chunked", "products")
        )
        lines.append(
            f"| {shape} | {case['threads']} | {ours} | {again} | {unfused} | {ratio(medians, 'ours', 'unfused')} | "
            f"{chunked} | {ratio(medians, 'chunked', 'ours')} | {products} |"
        )
    lines += [
        "",
        "| rows x features x classes, fp32 | beyond the gradients, MiB: linear_dm_loss | linear, cross_entropy | share |",
        "|---|---|---|---|",
    ]
    sides = {(*case["shape"], case["side"]): case["beyond_gradients_mib"] for case in found["memory"]}
    for shape in CPU_SHAPES:
        ours, unfused = sides[*shape, "ours"], sides[*shape, "unfused"]
        lines.append(f"| {' x '.join(map(str, shape))} | {ours} | {unfused} | {ours / unfused:.3f} |")
    lines += [
        "",
        f"{' x '.join(map(str, LARGE))} in bf16: {sides[*LARGE, 'ours'] / 1024:.2f} GiB beyond inputs and returned gradients, "
        f"and {sides[*LARGE, 'bounded'] / 1024:.2f} GiB with max_logits_bytes = {MAX_LOGITS_BYTES >> 20} MiB; "
        f"the logits alone are {LARGE[0] * LARGE[2] * 2 / 2**30:.2f} GiB.",
    ]
    lines += [
        "",
        f"Rows left out, skip_tolerance={TOLERANCE}, CCE, one thread; processor time, ms.",
        "",
        "| rows x features x classes | fitted | left out | accumulated | recompute | sparse | sparse / accumulated |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["sparse"]:
        medians = {side: value["processor"] for side, value in case["median_ms"].items()}
        lines.append(
            f"| {' x '.join(map(str, case['shape']))} | {case['fitted']:.0%} | {case['skipped']:.1%} | "
            f"{medians['accumulated']:.0f} | {medians['recompute']:.0f} | {medians['sparse']:.0f} | "
            f"{medians['sparse'] / medians['accumulated']:.2f} |"
        )
    lines += [
        "",
        "RMS error of the gradients by input and weight, relative to the unfused computation's (DM(8, 0.5), sum_weight).",
        "",
        "| dtype | accumulated | recompute |",
        "|---|---|---|",
    ]
    for case in found["accuracy"]:
        ours, again = (" / ".join(map(str, case["of_unfused"][side])) for side in ("ours", "recompute"))
        lines.append(f"| {case['dtype']} | {ours} | {again} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunked", type=int, default=1, help="repeats of F.linear_cross_entropy, which is slow; 0 for none")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--warm", action="store_true", help="time with an allocator that keeps its memory, see bench.cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=["time", "memory", "sparse", "accuracy", "gpu"], help="used by the whole")
    parser.add_argument("--case", nargs="+", help="used by the whole")
    arguments = parser.parse_args()
    case = arguments.case or []
    if arguments.part == "time":
        shape = tuple(map(int, case[:3]))
        print(json.dumps(time_case(shape, int(case[3]), arguments.repeats, arguments.chunked, "cpu")))
    elif arguments.part == "memory":
        print(json.dumps(memory_case(tuple(map(int, case[:3])), *case[3:])))
    elif arguments.part == "sparse":
        print(json.dumps(sparse_case(tuple(map(int, case[:3])), float(case[3]), arguments.repeats)))
    elif arguments.part == "accuracy":
        print(json.dumps(accuracy_case(case[0])))
    elif arguments.part == "gpu":
        shape = tuple(map(int, case[:3]))
        found = time_case(shape, 1, arguments.repeats, 0, "cuda")
        print(json.dumps({**found, **gpu_memory_case(shape)}))
    if arguments.part is not None:
        return

    import torch

    options = ["--repeats", str(arguments.repeats), "--chunked", str(arguments.chunked)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        cases = [_part(["--part", "gpu", *options, "--case", *map(str, shape)]) for shape in GPU_SHAPES]
        found = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "gpu": cases}
        (arguments.output / "linear_gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
        return
    found = {
        "torch": torch.__version__,
        "device": _processor(),
        "cores": os.cpu_count(),
        "command": "python -m bench.linear " + " ".join(sys.argv[1:]),
        "repeats": arguments.repeats,
        "allocator": "warm" if arguments.warm else "default",
        "load": os.getloadavg(),
        "time": [
            _part(["--part", "time", *options, "--case", *map(str, shape), str(threads)], arguments.warm)
            for threads in arguments.threads
            for shape in CPU_SHAPES
        ],
        "memory": [
            _part(["--part", "memory", "--case", *map(str, shape), side, dtype])
            for shape, dtype, sides in (
                *((shape, "float32", ("ours", "unfused")) for shape in CPU_SHAPES),
                (LARGE, "bfloat16", ("ours", "bounded")),
            )
            for side in sides
        ],
        "sparse": [_part(["--part", "sparse", *options, "--case", "512", "256", "30522", str(share)]) for share in SHARES],
        "accuracy": [_part(["--part", "accuracy", "--case", dtype]) for dtype in ("bfloat16", "float16")],
    }
    name = "linear_warm" if arguments.warm else "linear"
    (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / f"{name}.md").write_text(text(found))
    print(text(found))


if __name__ == "__main__":
    main()
