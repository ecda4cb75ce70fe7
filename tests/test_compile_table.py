"""Every kernel compiled for sm_80, sm_90, sm_100 and gfx942, and its machine code held to the bounds of bench.compile_table.

The compiler is the installed Triton and, where FUSED_DM_OTHER_TRITON names a folder that holds one, that too: what one version
accepts is no evidence for another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER = os.environ.get("FUSED_DM_OTHER_TRITON")


@pytest.mark.parametrize("path", [None, *([OTHER] if OTHER else [])], ids=lambda path: "other" if path else "installed")
def test_bounds(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*([path] if path else []), str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "bench.compile_table"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / f"compile_table-{'other' if path else 'installed'}.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 outside the bounds" in done.stdout
    if path:
        assert f"Triton {Path(path).name.removeprefix('triton-')};" in done.stdout
