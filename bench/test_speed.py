"""A small suite for any machine: `pytest bench --benchmark-only`.

A forward pass and a training step of fused_dm and of torch's cross entropy at four shapes. Each case is checked before it is
timed. On a GPU a timed call ends with a synchronisation, which it includes; figures for publication come from bench.study.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from bench.study import GPU, Case, batch, check, exact_divisor, ways

CASES = [Case(128, 1000, "float32"), Case(1024, 1000, "bfloat16"), Case(64, 32000, "bfloat16"), Case(4, 128256, "float32")]
WAYS = ["fused_dm", "fused_dm, known divisor", "F.cross_entropy"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def given(request):
    case = request.param
    logits, target = batch(case, "cuda" if GPU else "cpu")
    return case, logits, target, exact_divisor(logits, target)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("part", ["forward", "step"])
def test_speed(given, name, part, benchmark):
    case, logits, target, divisor = given
    way = ways(case)[name]
    if way.ours:
        assert check(way, logits, target, divisor) <= 1
    leaf = logits.detach().requires_grad_(part == "step")

    def run():
        leaf.grad = None
        loss = way.loss(leaf, target)
        if part == "step":
            loss.backward()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {part}"
    benchmark.extra_info["bytes"] = case.bytes * (way.step if part == "step" else way.forward)
    benchmark(run)
