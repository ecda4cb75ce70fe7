"""Random calls of `dm_loss`, every implementation against the reference in fp64: `make fuzz`.

    python tests/fuzz.py --cases 50000 --processes 2 --seed 1

A case draws shape, strides, dtypes, EDF and parameters, weights, ignored rows, extreme and special values, reduction and
upstream gradient, and compares the reference in the case's dtype, the CPU implementation and the kernels, each as the fused
path and through the margin operator, and in place where that is allowed. In the interpreter every lane's bounds are checked
as well. A failure is shrunk by hypothesis and printed; then it becomes a named test in test_regressions.py. The tests run a
short form, with cases that are the same each time.

The largest error of all cases, as a share of the bound, shows how much room the bound leaves.
"""

import argparse
import collections
import contextlib
import dataclasses
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

# The worker processes, too, import this file as their main module.
if __name__ in ("__main__", "__mp_main__"):
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
    import conftest  # noqa: F401  the interpreter, made strict

import numpy as np
import torch
from batches import COMPOSITIONS, GPU, device_of, make
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from interpreter import bounds
from launches import WAYS, forced
from strategies import PARAMETERS, from_breaks, of_kind
from tolerance import Expected, check, compute_dtype, expected, shares

from fused_dm import dm_loss, edf, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TARGETS = [torch.int64, torch.int32, torch.int16, torch.uint8]
LAYOUTS = ["contiguous", "padded rows", "odd rows", "columns first", "every other class", "spatial", "channels last"]
RESULTS = ["loss", "dlogits", "example_weight", "target_prob", "sum_weight"]
REDUCTIONS = ["sum_weight", "mean", "sum", "none"]
# Where a weight overflows that nothing divides, above log w = 88, nothing is promised.
LARGEST_LOG_WEIGHT = 60.0

finite = {"allow_nan": False, "allow_infinity": False, "width": 32}


def numbers(low, high):
    return st.floats(low, high, **finite)


EMPHASES = st.one_of(
    st.builds(edf.DM, beta=st.one_of(numbers(-40, 40), st.sampled_from([1000.0, -1000.0])), lambd=numbers(0, 5)),
    st.sampled_from(list(PARAMETERS)).flatmap(of_kind),
    st.sampled_from(list(PARAMETERS)).flatmap(of_kind),
    st.sampled_from(COMPOSITIONS),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """How class or sample weights are drawn."""

    kind: str
    dtype: torch.dtype

    def tensor(self, count: int, seed: int) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        values = {
            "none": None,
            "positive": uniform + 0.1,
            "signed": 2 * uniform - 0.7,
            "zeros": (uniform > 0.5).double(),
            "wide": torch.exp(20 * (uniform - 0.5)),
            "tiny": 1e-30 * (uniform + 0.1),
        }[self.kind]
        return None if values is None else values.to(self.dtype)


KINDS = ["none", "none", "positive", "signed", "zeros", "wide"]
WEIGHT_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@dataclasses.dataclass(frozen=True)
class Case:
    """A drawn call."""

    emphasis: edf.EDF
    rows: int
    classes: int
    dtype: torch.dtype
    layout: str
    target_dtype: torch.dtype
    ignore_index: int
    ignored: float
    seed: int
    scale: float
    margins: float
    offset: float
    special: tuple[tuple[float, bool, int], ...]  # value, at the label, row and class
    weight: Weights
    sample_weight: Weights
    reduction: str
    normalizer: float | None
    eps: float | None
    dloss: float
    path: str  # fused, margin, in place
    way: str | None  # to launch the kernels; None for what the sizes choose
    softcap: float | None
    logit_scale: float | None

    def options(self) -> dict:
        return {
            "weight": self.weight.tensor(self.classes, self.seed + 1),
            "sample_weight": self.sample_weight.tensor(self.rows, self.seed + 2),
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "normalizer": self.normalizer if self.reduction == "sum" else None,
            "eps": self.eps,
            **({} if self.softcap is None else {"softcap": self.softcap}),
            **({} if self.logit_scale is None else {"logit_scale": self.logit_scale}),
        }


CASES = st.builds(
    Case,
    emphasis=EMPHASES,
    rows=st.integers(0, 12),
    classes=st.one_of(st.integers(1, 40), st.integers(1, 40), st.sampled_from([128, 255, 257, 1000])),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    target_dtype=st.sampled_from(TARGETS),
    ignore_index=st.sampled_from([-100, -100, 0, 3, 255]),
    ignored=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 2.0, 10.0, 40.0]),
    margins=st.sampled_from([0.0, 1.0, 8.0, 20.0, 80.0, 1e4]),
    offset=st.sampled_from([0.0, 0.0, 0.0, 1e4, -1e4, 100.0]),
    special=st.lists(
        st.tuples(st.sampled_from([-math.inf, -math.inf, math.inf, math.nan, 3e4, -3e4]), st.booleans(), st.integers(0, 10**4)),
        max_size=3,
    ).map(tuple),
    weight=st.builds(Weights, st.sampled_from(KINDS), WEIGHT_DTYPES),
    sample_weight=st.builds(Weights, st.sampled_from([*KINDS, "tiny"]), WEIGHT_DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    normalizer=st.sampled_from([None, 1.0, 7.5, 1e-3, 1e4, 1e-30, 1e30]),
    eps=st.sampled_from([None, None, 0.0, 1e-6, 0.1]),
    dloss=st.sampled_from([1.0, 1.0, 0.0, -2.0, 0.37]),
    path=st.sampled_from(["fused", "margin", "in place"]),
    way=st.sampled_from([None, None, *WAYS]),
    softcap=st.sampled_from([None, None, None, 1.0, 30.0]),
    logit_scale=st.sampled_from([None, None, None, 0.3, 2.0]),
)


def laid_out(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same rows (N, V) in another place in memory; the spatial layouts are (1, V, N)."""
    rows, classes = logits.shape
    if layout == "contiguous":
        return logits
    if layout == "columns first":
        return logits.t().contiguous().t()
    if layout == "spatial":
        return logits.t().contiguous()[None]
    if layout == "channels last":
        return logits.clone()[None].movedim(-1, 1)
    wide = torch.full((rows, 2 * classes + 16), math.nan, dtype=logits.dtype, device=logits.device)
    at = {"padded rows": wide[:, 8 : 8 + classes], "odd rows": wide[:, 3 : 3 + classes], "every other class": wide[:, ::2]}
    view = at[layout][:, :classes]
    view.copy_(logits)
    return view


def rows_of(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return tensor[0].t() if layout in ("spatial", "channels last") else tensor


def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and target (N,) of a case."""
    logits, target = make(
        case.rows,
        case.classes,
        case.dtype,
        seed=case.seed,
        scale=case.scale,
        margins=case.margins,
        offset=case.offset,
        ignored=case.ignored,
    )
    for value, at_label, where in case.special:
        if case.rows:
            row = where % case.rows
            label = int(target[row])
            logits[row, label if at_label and label >= 0 else where % case.classes] = value
    if case.ignore_index != -100:
        # A class may be the one that is ignored.
        target = torch.where(target == -100, case.ignore_index, target)
    return logits, target


def call(impl: str, case: Case, emphasis, logits: torch.Tensor, target: torch.Tensor, options: dict):
    """DMOutput by rows, and dlogits (N, V)."""
    device = device_of(impl)
    leaf = laid_out(logits.to(device, copy=True), case.layout).detach().requires_grad_()
    given = leaf
    inplace = case.path == "in place" and impl != "reference" and can_be_overwritten(leaf)
    if inplace:
        # Same strides: an elementwise product keeps them where the tensor is dense, and a view of one where it is not.
        base = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        given = base.copy_(leaf)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    where = target.to(case.target_dtype).to(device)
    if leaf.dim() == 3:
        where = where[None]
        if options["sample_weight"] is not None:
            options["sample_weight"] = options["sample_weight"][None]
    output = dm_loss(given, where, emphasis, impl=impl, inplace=inplace, return_output=True, **options)
    upstream = torch.full_like(output.loss, case.dloss)
    (gradient,) = torch.autograd.grad(output.loss, leaf, upstream)
    if inplace:
        assert gradient.shape == leaf.shape
    else:
        assert torch.equal(rows_of(leaf.detach(), case.layout).cpu().nan_to_num(7), logits.nan_to_num(7)), "logits changed"
    flat = output._replace(
        loss=output.loss.reshape(-1) if options["reduction"] == "none" else output.loss,
        example_weight=output.example_weight.reshape(-1),
        target_prob=output.target_prob.reshape(-1),
        correct=output.correct.reshape(-1),
    )
    return flat, rows_of(gradient, case.layout)


def can_be_overwritten(leaf: torch.Tensor) -> bool:
    rows = leaf if leaf.dim() < 3 else leaf.movedim(1, -1)
    adjacent = rows.shape[-1] == 1 or rows.stride(-1) == 1
    return adjacent and (leaf.dim() < 3 or rows.is_contiguous())


def compared(truth: Expected, gradient: torch.Tensor, case: Case) -> tuple[Expected, torch.Tensor]:
    """The truth and the gradient without what is not defined: rows without a value, what the storage cannot hold.

    Under "sum_weight" one row without a value leaves the whole batch without one.
    """
    defined = truth.dlogits.isfinite().all(1) & (truth.dlogits.abs() < 0.9 * torch.finfo(case.dtype).max).all(1)
    if case.reduction == "sum_weight" and truth.loss.isnan():
        defined = torch.zeros_like(defined)
    allowed = {**truth.allowed, "dlogits": truth.allowed["dlogits"][defined]}
    return truth._replace(dlogits=truth.dlogits[defined], allowed=allowed), gradient[defined.to(gradient.device)]


largest: dict[tuple[str, str, str], float] = collections.defaultdict(float)
seen: collections.Counter = collections.Counter()


def run_case(case: Case) -> None:
    """Compare every implementation with the truth."""
    logits, target = problem(case)
    assume(case.target_dtype != torch.uint8 or case.ignore_index in (0, 3, 255) or not (target < 0).any())
    assume(not (target.numel() and target.max() > torch.iinfo(case.target_dtype).max))
    options = case.options()
    if case.path == "margin" and options["eps"] is None:
        options["eps"] = 0.0 if case.emphasis.has_loss else 1e-6
    emphasis = case.emphasis.log_weight if case.path == "margin" else case.emphasis
    seen_by_loss = logits.double() * (1.0 if case.logit_scale is None else case.logit_scale)
    if case.softcap is not None:
        seen_by_loss = case.softcap * torch.tanh(seen_by_loss / case.softcap)
    margins = reference.margin(seen_by_loss, target, case.ignore_index)
    # A row whose margin is that of a jump may have either weight.
    assume(not (from_breaks(case.emphasis, margins) < 0.01 * (1 + margins.abs())).any())
    if case.reduction == "none":
        log_p, log_q = (torch.nn.functional.logsigmoid(sign * margins).clamp(min=-1e30) for sign in (1, -1))
        assume(not (case.emphasis.log_weight(log_p, log_q) > LARGEST_LOG_WEIGHT).any())
    tied = torch.zeros(case.rows, dtype=torch.bool)
    if case.softcap is not None:
        label = torch.where(target == case.ignore_index, 0, target).long()[:, None]
        others = seen_by_loss.scatter(1, label, -math.inf).amax(1)
        tied = (seen_by_loss.gather(1, label)[:, 0] - others).abs() <= 16 * torch.finfo(
            compute_dtype(case.dtype)
        ).eps * case.softcap
    upstream = torch.tensor(case.dloss, dtype=compute_dtype(case.dtype)).expand(
        logits.shape[0] if case.reduction == "none" else ()
    )
    truth = expected(logits, target, emphasis, upstream, **options)
    # What is out of range has no digits. The sum of weights is fp64.
    largest_number = torch.finfo(compute_dtype(case.dtype)).max
    impossible = bool((margins == -math.inf).any())
    for value, may_be_infinite in ((truth.loss, impossible), (truth.example_weight, False)):
        held = value.isnan() | (value.abs() <= 0.1 * largest_number) | (value.isinf() & may_be_infinite)
        assume(bool(held.all()))
    assume(not truth.sum_weight.isinf())
    seen["infinite value" if truth.loss.isinf().any() else "finite value"] += 1
    # The reference has 1 - tanh^2 by autograd, without digits where it has saturated.
    impls = ("cpu", "triton") if case.softcap is not None else ("reference", "cpu", "triton")
    for impl in impls:
        note(f"impl={impl}")
        way = forced(case.way) if impl == "triton" and case.way else contextlib.nullcontext()
        # The interpreter's inf - inf, which gives a row its nan.
        with way, np.errstate(invalid="ignore", over="ignore"):
            output, gradient = call(impl, case, emphasis, logits, target, dict(options))
        # Under a softcap what rounds to the cap is a tie.
        output = output._replace(correct=torch.where(tied, truth.correct, output.correct.cpu()))
        known, gradient = compared(truth, gradient, case)
        for name, share in shares(output, gradient, known).items():
            key = (impl, str(case.dtype).removeprefix("torch."), name)
            largest[key] = max(largest[key], share)
        check(output, gradient, known)
    seen[case.path] += 1
    seen[f"launch: {case.way or 'chosen'}"] += 1
    seen["softcap" if case.softcap else "no softcap"] += 1
    seen["scale" if case.logit_scale else "no scale"] += 1
    seen[case.layout] += 1
    seen[str(case.dtype)] += 1
    seen[type(case.emphasis).__name__] += 1


OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def fuzz(cases: int, seed: int) -> str | None:
    """Run so many cases; the report of a failure, shrunk, or None."""

    @seeded(seed)
    @settings(max_examples=cases, phases=[Phase.generate, Phase.shrink], **OPTIONS)
    @given(CASES)
    def one(case: Case) -> None:
        run_case(case)

    try:
        one()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"seed {seed}: {type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", []))
    return None


def _worker(arguments: tuple[int, int]) -> tuple[str | None, dict, collections.Counter, dict]:
    cases, seed = arguments
    largest.clear()
    seen.clear()
    failure = fuzz(cases, seed)
    lanes = {}
    if not GPU:
        lanes, bounds.lanes = dict(bounds.lanes), {"load": 0, "store": 0}
    return failure, dict(largest), collections.Counter(seen), lanes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--chunk", type=int, default=500, help="cases between two seeds")
    parser.add_argument("--output", type=Path, help="write the summary to this file")
    arguments = parser.parse_args()
    chunks = [
        (min(arguments.chunk, arguments.cases - start), arguments.seed + start)
        for start in range(0, arguments.cases, arguments.chunk)
    ]
    started = time.time()
    failures, most, counts, lanes = [], collections.defaultdict(float), collections.Counter(), collections.Counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for number, (failure, shares_of, seen_of, lanes_of) in enumerate(pool.imap_unordered(_worker, chunks), 1):
            if failure:
                failures.append(failure)
                print(failure, flush=True)
            for key, share in shares_of.items():
                most[key] = max(most[key], share)
            counts.update(seen_of)
            lanes.update(lanes_of)
            if number % 10 == 0:
                print(f"{number * arguments.chunk} cases, {len(failures)} failures, {time.time() - started:.0f} s", flush=True)
    completed = sum(count for name, count in counts.items() if name in ("fused", "margin", "in place"))
    lines = [
        f"{completed} cases compared in three implementations, {len(failures)} failing chunks of {len(chunks)}; "
        f"seed {arguments.seed}, torch {torch.__version__}",
        f"lanes checked in the interpreter: {lanes['load']:,} loaded, {lanes['store']:,} stored, 0 outside their tensor"
        if not failures
        else "",
        "cases by kind: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()),
        "",
        "Largest error of all elements of all cases, as a share of its bound:",
        "",
        f"| implementation | dtype | {' | '.join(RESULTS)} |",
        "|---|---|" + "---|" * len(RESULTS),
        *(
            f"| {impl} | {dtype} | {' | '.join(f'{most[impl, dtype, name]:.2f}' for name in RESULTS)} |"
            for impl, dtype in sorted({key[:2] for key in most})
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        command = f"python tests/fuzz.py --cases {arguments.cases} --chunk {arguments.chunk} --seed {arguments.seed}"
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(f"# Fuzzing\n\n`{command}`\n\n{text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
