"""The benchmarks run, check before they time, count bytes and go on where they stopped; their figures are not tested."""

import importlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cpu, study

ROOT = Path(__file__).parents[1]
DESIGNED = (
    [(8192, classes) for classes in (32000, 50304, 102400, 128256, 152064, 201088, 262144)]
    + [(rows, 128256) for rows in (1024, 2048, 4096, 8192, 16384, 32768)]
    + [(32768, 1 << power) for power in range(8, 17)]
    + [(rows, classes) for rows in (128, 256, 1024, 4096) for classes in (10, 100, 1000, 10000, 21841)]
    + [(64, 1_000_000), (16, 10_000_000)]
)
TINY = [study.Case(8, 100, "bfloat16"), study.Case(5, 30, "float32")]


def call(module: str, *arguments: str) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A process of pytest's own is not one of xdist's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "module", sorted(path.stem for path in (ROOT / "bench").glob("[!_]*.py") if path.stem not in ("test_speed", "null_driver"))
)
def test_every_benchmark_can_be_imported(module):
    assert callable(importlib.import_module(f"bench.{module}").main)


class TestStudy:
    def test_every_shape_is_there_the_promised_ones_first(self):
        found = [(case.rows, case.classes, case.dtype) for case in study.cases()]
        assert len(set(found)) == len(found)
        assert {(*shape, "bfloat16") for shape in DESIGNED} <= set(found)
        assert {shape[2] for shape in found} == {"bfloat16", "float32"}
        assert found[:2] == [(8192, 32000, "bfloat16"), (8192, 128256, "bfloat16")]

    def test_probabilities_spread_over_the_unit_interval(self):
        logits, target = study.batch(study.Case(2000, 50, "bfloat16"), "cpu")
        p = logits.double().softmax(1).gather(1, target[:, None])
        shares = torch.histc(p, 4, 0, 1) / len(p)
        assert (shares > 0.05).all()

    def test_the_whole_and_again(self, tmp_path):
        """Every way is measured once; a second call measures nothing and adds its command."""
        first = call("bench.study", "--quick", "--output", str(tmp_path / "s.json"), "--only", "16 x")
        assert first.returncode == 0, first.stdout + first.stderr
        assert "0 timings left" in first.stdout
        found = json.loads((tmp_path / "s.json").read_text())
        (case,) = found["cases"].values()
        for name, result in case["ways"].items():
            if "failed" in result:  # A rival that does not take so small a case.
                assert not result["ours"], name
                continue
            assert result["step_ms"]["q20"] <= result["step_ms"]["q50"] <= result["step_ms"]["q80"], name
            if name.startswith("fused_dm"):
                assert result["error_share"] <= 1
        assert case["copy_bytes"] == 2 * 16 * 5003 * 2
        assert case["ways"]["fused_dm"]["step_bytes"] == 3 * 16 * 5003 * 2
        assert case["ways"]["fused_dm, known divisor"]["step_bytes"] == 2 * 16 * 5003 * 2
        assert "| fused_dm, in place |" in (tmp_path / "s.md").read_text()
        assert (tmp_path / "s.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
        second = call("bench.study", "--quick", "--output", str(tmp_path / "s.json"), "--only", "16 x")
        assert second.returncode == 0, second.stdout + second.stderr
        again = json.loads((tmp_path / "s.json").read_text())
        assert again["cases"] == found["cases"]
        assert len(again["commands"]) == 2

    def test_a_spent_budget_leaves_the_rest(self, tmp_path):
        left = study.study(TINY, tmp_path / "s.json", budget=-1, seconds=0.01)
        assert len(left) == sum(len(study.ways(case)) for case in TINY)
        assert not study.study(TINY[1:], tmp_path / "s.json", budget=1e9, seconds=0.01)
        assert len(study.study(TINY, tmp_path / "s.json", budget=-1, seconds=0.01)) == len(study.ways(TINY[0]))

    def test_a_rival_that_fails_costs_no_other_figures(self, tmp_path, monkeypatch):
        def fail(logits, target):
            raise ValueError("expected fewer classes\nand more")

        good = study.ways(TINY[0])["fused_dm"]
        chosen = {"rival": study.Way(fail, "sum_weight"), "fused_dm": good}
        monkeypatch.setattr(study, "ways", lambda case: chosen)
        study.study(TINY[:1], tmp_path / "s.json", budget=1e9, seconds=0.01)
        found = json.loads((tmp_path / "s.json").read_text())
        (case,) = found["cases"].values()
        assert case["ways"]["rival"] == {"failed": "ValueError: expected fewer classes", "ours": False}
        assert "step_ms" in case["ways"]["fused_dm"]
        assert "| rival | ValueError: expected fewer classes |" in study.table(found)

    def test_results_of_another_device_are_not_continued(self, tmp_path):
        path = tmp_path / "s.json"
        path.write_text(json.dumps({**study.machine(), "device": "another", "commands": [], "cases": {}}))
        with pytest.raises(ValueError, match=r"expected results of device .*, got another; give another --output"):
            study.study(TINY, path, budget=1, seconds=0.01)

    @pytest.mark.parametrize("way", ["fused_dm", "fused_dm, known divisor", "fused_dm, in place"])
    @pytest.mark.parametrize("wrong", [0.0, 1.1])
    def test_a_wrong_gradient_is_not_timed(self, way, wrong, monkeypatch):
        """Its error is seen on some rows, and so is a wrong sum of weights, and no time is given for it."""
        case = TINY[0]
        logits, target = study.batch(case, "cpu")
        right = study.ways(case)[way]
        planted = study.Way(lambda z, y: right.loss(z, y) * wrong, right.truth, ours=True, overwrites=right.overwrites)
        divisor = study.exact_divisor(logits, target)
        assert "step_ms" in study.measure(right, case, logits, target, divisor, 0.01)
        assert set(study.measure(planted, case, logits, target, divisor, 0.01)) == {"error_share", "truth", "failed", "ours"}
        if right.truth == "sum_weight":
            assert study.check(right, logits, target, divisor * 1.001) > 1

    def test_share_of_the_limit(self):
        case = {"copy_bytes": 2e9, "copy_ms": {"q50": 1.0}}
        result = {"step_bytes": 3e9, "step_ms": {"q50": 2.0}}
        assert study.share_of_limit(case, result, "step") == 0.75


class TestCPU:
    def test_a_case_of_each_part(self):
        for shape, call in itertools.product([(64, 50), (2, 5, 8, 8)], ["plain", *cpu.CALLS]):
            row = cpu.pooled([cpu.time_case(shape, "bfloat16", 1, 1, call) for _ in range(2)])
            assert [len(found[name]) for found in row["seconds"] for name in ("ours", "theirs")] == [4] * 4
            assert row["call"] == call
            assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert cpu.memory_case((64, 50), "float32")["gradient_mib"] == round(64 * 50 * 4 / 2**20, 1)

    def test_the_shapes_are_those_of_the_table(self):
        assert {math.prod(shape) for shape in cpu.SHAPES} >= {4096 * 1000, 1024 * 32000, 512 * 128256, 32 * 10**6}
        assert any(len(shape) == 4 for shape in cpu.SHAPES)


def test_the_suite_runs():
    pytest.importorskip("pytest_benchmark")
    done = call(
        "pytest", "bench", "--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", "-q", "-p", "no:xdist"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
