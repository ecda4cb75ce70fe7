"""The examples that a reader sees: docstrings and README run as they stand."""

import doctest
import re
from pathlib import Path

import pytest

import fused_dm
from fused_dm import _api, _environment, _linear, _report, edf, schedules

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize(
    "module",
    [fused_dm, _api, _environment, _linear, _report, edf, edf._check, edf._custom, schedules],
    ids=lambda module: module.__name__,
)
def test_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_public_functions_have_whole_docstrings():
    for name in ("dm_loss", "DMLoss", "linear_dm_loss", "LinearDMLoss", "margin", "emphasis_report"):
        text = getattr(fused_dm, name).__doc__
        for part in ("Args:", "Raises:", "Example:"):
            assert part in text, f"{name}: expected {part}"


def blocks():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(f"{page.name}, block {number}", code, id=f"{page.stem}-{number}")


@pytest.mark.parametrize(("name", "code"), list(blocks()))
def test_pages(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target


def test_readme_shows_how_to_use_the_package():
    assert re.search(r"```python\n.*dm_loss", README.read_text(), re.DOTALL)
