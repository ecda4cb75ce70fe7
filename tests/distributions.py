"""The distributions proved where the source tree is not: `make package` writes bench/results/packaging.md.

The sdist is built, and the wheel from it, and what is in them is compared with the tree. The wheel is installed, with the
versions of constraints.txt, in an environment of its own: first bare, then with each extra. The Python blocks and the
commands of README.md and docs/ run there, a typed client is checked, and triton is uninstalled and everything that does not
need it is run again. Then the same with Python 3.12 and the lowest version of everything that pyproject.toml admits, and
last, with the same Python and torch, the sdist's tests run on the unpacked sdist, nothing installed.

It takes minutes and, where torch brings CUDA, gigabytes. `--workdir` keeps the environments for the next run.
"""

import argparse
import email.message
import email.parser
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Those of the kernels and of what is built on them; `--tests tests` runs all.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "loss",
        "edges",
        "inplace",
        "operators",
        "transforms",
        "edf",
        "edf_catalogue",
        "schedules",
        "margin",
        "examples",
    )
]
PARTS = ("installed", "lowest")
# The numpy that the interpreter of the lowest Triton works with: see pyproject.toml.
LOWEST_NUMPY = "numpy<2.4"

# Ends every program that is run, so that none can have run on the source tree.
HERE = "\nimport sys, fused_dm\nassert fused_dm.__file__.startswith(sys.prefix), fused_dm.__file__\n"
# The first is torch's own, on import: the package needs no numpy. The second is that of pyproject.toml.
IGNORED = (
    "Failed to initialize NumPy:UserWarning",
    "Conversion of an array with ndim > 0 to a scalar:DeprecationWarning:triton.runtime.interpreter",
)
STRICT = ("-W", "error", *(part for warning in IGNORED for part in ("-W", f"ignore:{warning}")))
VERSIONS = """
import importlib.metadata as metadata, sys
print("Python", sys.version.split()[0])
for name in ("fused_dm", "torch", "triton", "numpy", "matplotlib", "typer", "rich"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
"""
STEP = """
import torch, fused_dm
logits, target = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
for impl in (None, "cpu", "reference"):
    fused_dm.dm_loss(logits, target, "dm:beta=8,lambd=0.5", impl=impl).backward()
step = torch.compile(fused_dm.dm_loss, fullgraph=True, backend="aot_eager")
step(logits, target, fused_dm.edf.GCE(q=0.7)).backward()
assert fused_dm.reference.__name__ == "fused_dm.reference" and logits.grad.abs().sum() > 0
"""
DOCTESTS = """
import doctest, importlib, pkgutil, fused_dm
tried = 0
for module in pkgutil.walk_packages(fused_dm.__path__, "fused_dm."):
    if module.name.split(".")[-1] not in ("__main__", "_cli", "_plot", "_triton"):
        result = doctest.testmod(importlib.import_module(module.name))
        assert not result.failed
        tried += result.attempted
assert tried
"""
PICTURE = """
import pathlib, torch, fused_dm
target = torch.arange(8) % 5
output = fused_dm.dm_loss(torch.randn(8, 5), target, "dm:beta=8,lambd=0.5", return_output=True)
fused_dm.emphasis_report(output, target).plot("report.png")
assert pathlib.Path("report.png").stat().st_size > 1000
"""
KERNELS = """
import torch, fused_dm, fused_dm_kernels
device = "cuda" if torch.cuda.is_available() else "cpu"
assert fused_dm.available_impls() == ("triton", "cpu", "reference")
logits, target = torch.randn(8, 50, dtype=torch.float64, device=device), torch.arange(8, device=device)
gradients = []
for impl in ("triton", "reference"):
    rows = logits.clone().requires_grad_()
    fused_dm.dm_loss(rows, target, "dm:beta=8,lambd=0.5", impl=impl).backward()
    gradients.append(rows.grad)
torch.testing.assert_close(*gradients)
"""
REFUSED = """
import torch, fused_dm
assert fused_dm.available_impls() == ("cpu", "reference")
try:
    fused_dm.dm_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), "cce", impl="triton")
except (RuntimeError, ValueError) as error:
    print(error)
"""
CLIENT = """
import torch
from torch import Tensor

from fused_dm import DMLoss, DMOutput, dm_loss, edf, emphasis_report, margin, schedules

logits, target = torch.randn(4, 10, requires_grad=True), torch.arange(4)
density: edf.EDF = edf.DM(beta=8, lambd=0.5)
loss: Tensor = dm_loss(logits, target, density)
output: DMOutput = dm_loss(logits, target, "cce", reduction="mean", return_output=True)
margins: Tensor = margin(logits, target)
criterion = DMLoss(density, return_output=True)
schedule = schedules.Linear(criterion, steps=10, beta=2)
shares: str = str(emphasis_report(output, target))
"""
WRONG_CLIENT = """
import fused_dm

loss: int = fused_dm.dm_loss([[0.0, 1.0]], 1, "cce")
"""


def python_blocks() -> list[tuple[str, str]]:
    """Name and code of every Python block of the pages."""
    return [
        (f"{page.stem}-{number}", code)
        for page in PAGES
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands() -> list[str]:
    """Every call of `fused-dm` that the pages show, in a line of its own or in the text."""
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"^(fused-dm [^#\n]*)|`(fused-dm [^`]*)`", text, re.MULTILINE)
    return list(dict.fromkeys((line or inline).strip() for line, inline in found))


def tree(*folders: str) -> set[str]:
    """The files below folders of the tree, without what running it leaves there."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts)
    }


def check_metadata(text: str, version: str) -> email.message.Message:
    """The metadata, which must be that of pyproject.toml with the README as the description."""
    metadata = email.parser.Parser().parsestr(text)
    expected = {
        "Name": "fused_dm",
        "Version": version,
        "License-Expression": "MIT",
        "License-File": "LICENSE",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    for name, value in expected.items():
        assert metadata[name] == value, f"{name}: expected {value}, got {metadata[name]}"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(), "the description is not the README"
    assert {"cli", "plot"} <= set(metadata.get_all("Provides-Extra", []))
    return metadata


def check_wheel(path: Path) -> email.message.Message:
    """Both packages whole, with py.typed, licence and command, and nothing else; returns the metadata."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (version,) = re.findall(r'__version__ = "(.*)"', archive.read("fused_dm/__init__.py").decode())
        about = f"fused_dm-{version}.dist-info"
        packages = {name.removeprefix("kernels/") for name in tree("fused_dm", "kernels/fused_dm_kernels")}
        extra = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
        assert names == packages | extra, f"the wheel differs from the tree in {sorted(names ^ (packages | extra))}"
        assert "fused_dm/py.typed" in names
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "fused-dm = fused_dm.__main__:main" in archive.read(f"{about}/entry_points.txt").decode()
        assert path.name == f"fused_dm-{version}-py3-none-any.whl"
        return check_metadata(archive.read(f"{about}/METADATA").decode(), version)


def check_sdist(path: Path) -> None:
    """The tree: packages, tests, benchmarks and examples, and what `make` needs."""
    with tarfile.open(path) as archive:
        (top,) = {name.split("/")[0] for name in archive.getnames()}
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
        files = {
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "CHANGELOG.md",
            "Makefile",
            "constraints.txt",
            ".gitignore",
            "PKG-INFO",
        }
        expected = files | tree("fused_dm", "kernels", "tests", "bench", "docs", "examples")
        assert names == expected, f"the sdist differs from the tree in {sorted(names ^ expected)}"
        text = archive.extractfile(f"{top}/PKG-INFO").read().decode()
        check_metadata(text, top.removeprefix("fused_dm-"))


class Row(NamedTuple):
    """A line of the table."""

    environment: str
    what: str
    command: str
    outcome: str
    seconds: float


class Stopped(Exception):
    """What comes next needs what has just failed."""


def commit() -> str:
    """Of the source tree, as git describes it."""
    git = shutil.which("git")
    if git is None:
        return "no git to tell the commit"
    told = subprocess.run([git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return f"commit {told.stdout.strip()}" if told.returncode == 0 else "not of a commit"


class Proof:
    """Runs the steps, prints and keeps their outcomes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.versions, self.failures = folder, [], {}, 0

    def note(self, row: Row, passed: bool, output: str = "") -> None:
        self.rows.append(row)
        self.failures += not passed
        print(f"{row.environment}: {row.what}: {row.outcome} ({row.seconds:.0f} s)", flush=True)
        if not passed:
            print("".join(f"    {line}\n" for line in output.splitlines()[-40:]), end="", flush=True)

    def save(self, path: Path, wheel: Path) -> None:
        """Keep what a part found, for the table of a later run on the same wheel."""
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        path.write_text(json.dumps({"wheel": digest, "versions": self.versions, "rows": self.rows, "failures": self.failures}))

    def load(self, path: Path, wheel: Path) -> bool:
        """Take in what a part found before, if that was with this wheel."""
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("wheel") != hashlib.sha256(wheel.read_bytes()).hexdigest():
            return False
        self.rows += [Row(*row) for row in found["rows"]]
        self.versions |= found["versions"]
        self.failures += found["failures"]
        return True

    def write(self, path: Path) -> None:
        """The table, the environments' versions first."""
        lines = [
            "What `make package` did and found. The environments lie outside the source tree and, but for a kept torch,",
            "new; where the package is installed, every program checks that it ran on that. A command whose message is given",
            "must fail with it. The seconds are those of a machine that may have been busy.",
            "",
            f"- **source tree**: {commit()}",
            *(f"- **{name}**: {versions}" for name, versions in self.versions.items()),
            "",
            "| environment | what | command | outcome | s |",
            "|---|---|---|---|---|",
            *(f"| {r.environment} | {r.what} | `{r.command}` | {r.outcome} | {r.seconds:.0f} |" for r in self.rows),
            "",
            f"{len(self.rows)} steps, {self.failures} failed.",
            "",
        ]
        path.write_text("\n".join(lines))


class Environment:
    """A virtual environment, and the empty folder in which its programs run."""

    def __init__(self, proof: Proof, name: str, folder: str, python: str) -> None:
        self.proof, self.name, self.home = proof, name, proof.folder / folder
        self.bin, self.empty = self.home / "bin", proof.folder / f"{folder}-cwd"
        self.original = proof.folder / f"{folder}-torch.txt"
        shutil.rmtree(self.empty, ignore_errors=True)
        self.empty.mkdir()
        if not self.original.exists():
            shutil.rmtree(self.home, ignore_errors=True)
            subprocess.run([python, "-m", "venv", str(self.home)], check=True)

    def run(self, what, *command, shown=None, status=0, says="", cwd=None, timeout=3000, outcome=None, **variables) -> str:
        """Run a command of this environment; its status and text must be those expected."""
        started = time.monotonic()
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "FUSED_DM_OTHER_TRITON")
        }
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(self.bin / command[0]), *map(str, command[1:])],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or self.empty,
            timeout=timeout,
            env={**inherited, "PATH": path, "COLUMNS": "160", **variables},
        )
        text = done.stdout + done.stderr
        passed = done.returncode == status and says in text
        if passed:
            found = outcome(text) if outcome else f"“{says}”" if says else "passed"
        else:
            found = f"**failed**, exit {done.returncode}"
        shown = shown or shlex.join([command[0], *map(str, command[1:])])
        self.proof.note(Row(self.name, what, shown, found, time.monotonic() - started), passed, text)
        if not passed and command[0] == "pip":
            raise Stopped
        return text

    def pip(self, what, *arguments, constraints, shown, **options) -> None:
        """pip install."""
        constraint = [part for item in constraints for part in ("--constraint", str(item))]
        given = shlex.split(os.environ.get("PIP_ARGS", ""))
        self.run(what, "pip", "install", "--quiet", *constraint, *given, *arguments, shown=f"pip install {shown}", **options)

    def python(self, what, code, *, shown, **options) -> str:
        """A program, warnings being errors; it must have run on the installed package."""
        return self.run(what, "python", *STRICT, "-c", code + HERE, shown=shown, **options)

    def packages(self) -> set[str]:
        """What is installed, without the versions."""
        lines = subprocess.run([self.bin / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
        return {line.split("==")[0] for line in lines.splitlines()}

    def start(self, constraints: list[Path]) -> None:
        """torch alone; in a kept environment, everything that came after it is removed."""
        if not self.original.exists():
            self.pip("torch", "torch", constraints=constraints, shown="torch")
            self.original.write_text("\n".join(sorted(self.packages())))
        later = self.packages() - set(self.original.read_text().split())
        if later:
            subprocess.run([self.bin / "pip", "uninstall", "--quiet", "--yes", *sorted(later)], check=True)

    def note_versions(self) -> None:
        text = subprocess.run([self.bin / "python", "-c", VERSIONS], capture_output=True, text=True, check=True, cwd=self.empty)
        self.proof.versions[self.name] = ", ".join(text.stdout.splitlines())

    def pages(self, without: tuple[str, ...] = ()) -> None:
        """The Python blocks of the pages, each in a namespace of its own; those that need what is not here are left out."""
        blocks = [block for block in python_blocks() if not any(f"import {name}" in block[1] for name in without)]
        for name, code in blocks:
            (self.empty / f"{name}.py").write_text(code)
        program = f"import runpy\nfor name in {[name for name, _ in blocks]!r}:\n    runpy.run_path(name + '.py')\n"
        left_out = len(python_blocks()) - len(blocks)
        count = f"{len(blocks)} passed" + (f", {left_out} left out" if left_out else "")
        shown = "python -W error BLOCKS"
        self.python("Python blocks of README.md and docs/", program, shown=shown, outcome=lambda text: count)

    def commands(self) -> None:
        """The commands that the pages show, as they stand."""
        (self.empty / "docs").mkdir(exist_ok=True)
        for command in commands():
            self.run("a command of the pages", *shlex.split(command), shown=command)


def build(proof: Proof, folder: Path) -> tuple[Path, Path, email.message.Message]:
    """The sdist, the wheel made from it, and its metadata."""
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    constrained = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=constrained)
    passed = done.returncode == 0
    found = "passed" if passed else f"**failed**, exit {done.returncode}"
    row = Row("source tree", "sdist, and wheel from it, in isolation", "python -m build", found, time.monotonic() - started)
    proof.note(row, passed, done.stdout + done.stderr)
    if not passed:
        sys.exit("the build failed")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    check_sdist(sdist)
    metadata = check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        found = f"{len(archive.namelist())} files, {wheel.stat().st_size / 1024:.0f} KiB: the two packages, nothing else"
    proof.note(Row("source tree", "contents", "check_sdist, check_wheel", found, 0), True)
    return sdist, wheel, metadata


def prove_installed(proof: Proof, wheel: Path) -> None:
    """The wheel in an environment of today's versions: bare, with each extra, typed, and without triton."""
    here = Environment(proof, "installed", "installed", sys.executable)
    constraints = [ROOT / "constraints.txt"]
    here.start(constraints)
    before = here.packages()
    here.pip("the wheel, bare", wheel, constraints=constraints, shown="fused_dm.whl")
    added = {name.replace("-", "_") for name in here.packages() - before}
    named = f"came with it: {', '.join(sorted(added - {'fused_dm'})) or 'nothing'}"
    proof.note(Row(here.name, "nothing but torch and triton is needed", "pip list", named, 0), added <= {"fused_dm", "triton"})
    here.run("dependencies", "pip", "check")
    here.python("every implementation, compiled too", STEP, shown="python -W error -c STEP")
    here.pages()
    here.python("docstring examples", DOCTESTS, shown="python -W error -c DOCTESTS")
    here.run("the command without its extra", "fused-dm", "env", status=1, says="error: fused-dm needs typer and rich")
    here.python("forced kernels on a CPU tensor", REFUSED, shown="impl='triton'", says="impl='triton': expected")
    here.pip("extra cli alone", f"{wheel}[cli]", constraints=constraints, shown="'fused_dm.whl[cli]'")
    for argument in ("env", "edfs", "--help"):
        here.run("a command without matplotlib", "fused-dm", argument)
    here.run("the one that needs it", "fused-dm", "plot", "cce", status=2, says="error: fused-dm plot needs matplotlib")
    subprocess.run([here.bin / "pip", "uninstall", "--quiet", "--yes", "typer", "rich"], check=True)
    here.pip("extra plot alone", f"{wheel}[plot]", constraints=constraints, shown="'fused_dm.whl[plot]'")
    here.python("a report's picture", PICTURE, shown="EmphasisReport.plot")
    here.pip("both extras", f"{wheel}[cli,plot]", "mypy", constraints=constraints, shown="'fused_dm.whl[cli,plot]' mypy")
    here.run("dependencies", "pip", "check")
    here.commands()
    here.run("as a module", "python", "-m", "fused_dm", "env")
    here.python("kernels, interpreted", KERNELS, shown="TRITON_INTERPRET=1 python -c KERNELS", TRITON_INTERPRET="1")
    (here.empty / "client.py").write_text(CLIENT)
    (here.empty / "wrong.py").write_text(WRONG_CLIENT)
    here.run("a typed client", "mypy", "--strict", "client.py")
    here.run("one with a wrong type", "mypy", "--strict", "wrong.py", status=1, says='No overload variant of "dm_loss" matches')
    blocks = [f"{name}.py" for name, _ in python_blocks()]
    here.run("the pages' blocks", "mypy", "--check-untyped-defs", "--scripts-are-modules", *blocks, shown="mypy BLOCKS")
    here.note_versions()

    here.name = "installed, no triton"
    here.run("triton removed", "pip", "uninstall", "--quiet", "--yes", "triton")
    here.run("which pip then misses", "pip", "check", status=1, says="requires triton, which is not installed")
    here.python("every implementation, compiled too", STEP, shown="python -W error -c STEP")
    here.pages(without=("triton",))
    here.python("docstring examples", DOCTESTS, shown="python -W error -c DOCTESTS")
    here.commands()
    refused = "impl='triton': triton is not installed"
    here.python("forced kernels", REFUSED, shown="impl='triton'", says=refused)
    here.python(
        "forced kernels, interpreter asked for", REFUSED, shown="TRITON_INTERPRET=1", says=refused, TRITON_INTERPRET="1"
    )
    here.note_versions()


def lowest(metadata: email.message.Message) -> list[str]:
    """A constraint for the lowest version of everything that users install."""
    bounds = [
        re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", requirement)
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement or re.search(r"extra == '(cli|plot)'", requirement)
    ]
    return [LOWEST_NUMPY, *(f"{found[1]}=={found[2]}" for found in bounds if found)]


def prove_lowest(
    proof: Proof, sdist: Path, wheel: Path, metadata: email.message.Message, python: str, tests: list[str]
) -> None:
    """Python 3.12 and the lowest versions: the wheel installed; then the unpacked sdist's tests, uninstalled."""
    here = Environment(proof, "lowest versions", "lowest", python)
    oldest, pinned = proof.folder / "lowest-constraints.txt", proof.folder / "test-constraints.txt"
    pins = lowest(metadata)
    oldest.write_text("\n".join(pins))
    here.start([oldest])
    here.pip(
        "the wheel",
        f"{wheel}[cli,plot]",
        LOWEST_NUMPY,
        constraints=[oldest],
        shown="'fused_dm.whl[cli,plot]' " + " ".join(pins),
    )
    here.run("dependencies", "pip", "check")
    here.python("every implementation, compiled too", STEP, shown="python -W error -c STEP")
    here.pages()
    here.commands()
    here.run("its help", "fused-dm", "--help")
    here.python("kernels, interpreted", KERNELS, shown="TRITON_INTERPRET=1 python -c KERNELS", TRITON_INTERPRET="1")
    here.note_versions()

    here.name = "uninstalled"
    here.run("the package removed", "pip", "uninstall", "--quiet", "--yes", "fused_dm")
    free = ("torch", "triton", "numpy")
    given = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.split("==")[0] not in free]
    pinned.write_text("\n".join([*given, LOWEST_NUMPY, *(pin for pin in pins if pin.split("==")[0] in free)]))
    tools = ["pytest", "pytest-xdist", "hypothesis", "matplotlib", "rich", "typer", "numpy"]
    here.pip("the tests' tools; no hatchling", "--upgrade", *tools, constraints=[pinned], shown=" ".join(tools))
    source = proof.folder / "unpacked"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (source,) = source.iterdir()
    here.run(
        "tests of the unpacked sdist",
        *("python", "-m", "pytest", "-q", "-n", "2", *tests),
        shown=f"PYTHONPATH=.:kernels python -m pytest -n 2 {' '.join(tests)}",
        outcome=lambda text: re.findall(r"^(\d+ passed.*?) in ", text, re.MULTILINE)[-1],
        cwd=source,
        PYTHONPATH=os.pathsep.join([".", "kernels"]),
    )
    here.note_versions()


def find_python() -> str | None:
    """An interpreter of Python 3.12, on the path or among pyenv's."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12"))
    for candidate in (shutil.which("python3.12"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-V"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def main() -> None:
    """Run every part, write the table, and exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="keep the environments here, and use those that are")
    parser.add_argument("--python312", default=find_python(), help="an interpreter of Python 3.12 (default: the one found)")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what to run uninstalled; `tests` for all")
    parser.add_argument(
        "--part", choices=(*PARTS, "table"), help="this alone; the table needs the outcome of both, in the workdir"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "packaging.md")
    options = parser.parse_args()
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    folder = options.workdir or Path(tempfile.mkdtemp(prefix="fused_dm-"))
    table = Proof(folder.resolve())
    try:
        sdist, wheel, metadata = build(table, table.folder / f"dist-{options.part or 'all'}")
        for part in PARTS:
            proof, kept = Proof(table.folder), table.folder / f"{part}.json"
            if options.part in (None, part):
                if part == "lowest" and options.python312 is None:
                    sys.exit("no Python 3.12 found: pass --python312")
                try:
                    if part == "installed":
                        prove_installed(proof, wheel)
                    else:
                        prove_lowest(proof, sdist, wheel, metadata, options.python312, options.tests)
                except Stopped:
                    print("stopped: the rest of this part needs what has failed")
                proof.save(kept, wheel)
        loaded = [table.load(table.folder / f"{part}.json", wheel) for part in PARTS]
    finally:
        if options.workdir is None:
            shutil.rmtree(folder)
    if all(loaded):
        table.write(options.output)
    sys.exit(table.failures > 0)


if __name__ == "__main__":
    main()
