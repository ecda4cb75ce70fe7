"""The examples that a reader sees: docstrings and README run as they stand."""

import doctest
import re
from pathlib import Path

import pytest

import fused_dm
from fused_dm import _api, _environment, _report, edf, schedules

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("module", [_api, _environment, _report, edf, schedules], ids=lambda module: module.__name__)
def test_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_public_functions_have_whole_docstrings():
    for name in ("dm_loss", "DMLoss", "margin", "emphasis_report"):
        text = getattr(fused_dm, name).__doc__
        for part in ("Args:", "Raises:", "Example:"):
            assert part in text, f"{name}: expected {part}"


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README.read_text()))))
def test_readme(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]
    exec(compile(code, f"README.md, block {number}", "exec"), {})


def test_readme_shows_how_to_use_the_package():
    assert re.search(r"```python\n.*dm_loss", README.read_text(), re.DOTALL)
