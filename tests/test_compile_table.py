"""Every kernel compiled, and its machine code held to the bounds of bench.compile_table.

Here for sm_90 and without most variants of dtypes and options; `make compile-table` has those, and the other targets. The
compiler is the installed Triton and, where FUSED_DM_OTHER_TRITON names a folder that holds one, that too: what one version
accepts is no evidence for another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = os.environ.get("FUSED_DM_OTHER_TRITON")


CASES = {"installed-sm_90": (None, "sm_90")}
if OTHER:
    CASES["other-sm_90"] = (OTHER, "sm_90")


@pytest.mark.parametrize("name", CASES)
def test_bounds(name, tmp_path):
    path, target = CASES[name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*([path] if path else []), str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "bench.compile_table", "--target", target, "--main"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / f"compile_table-{name}.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 outside the bounds" in done.stdout
    if path:
        assert f"Triton {Path(path).name.removeprefix('triton-')};" in done.stdout
