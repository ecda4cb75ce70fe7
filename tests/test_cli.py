"""The command `fused-dm`: what it prints and draws, how it fails, and what is said where its packages are missing."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import fused_dm
from fused_dm import edf
from fused_dm._cli import app
from fused_dm._plot import draw_edfs

ROOT = Path(__file__).parents[1]
GALLERY = ["cce", "gce:q=0.7", "mae", "dm:beta=2,lambd=0", "dm:beta=12,lambd=0.5", "dm:beta=16,lambd=1"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def cells(output, first):
    """The cells of the table's row that begins with `first`."""
    for line in output.splitlines():
        row = [cell.strip() for cell in line.strip("│┃ ").split("│")]
        if row[0] == first:
            return row
    raise AssertionError(f"no row {first!r} in:\n{output}")


def test_plot_prints_and_draws(tmp_path):
    done = invoke("plot", "dm:beta=8,lambd=0.5", "GCE : q=0.7", "cce", "uniform", "--output", tmp_path / "edfs.png")
    assert done.exit_code == 0, done.output
    assert cells(done.stdout, "dm:beta=8,lambd=0.5") == ["dm:beta=8,lambd=0.5", "0.3333", "11.41", "50.41", "21.74"]
    assert cells(done.stdout, "gce:q=0.7")[1] == "0.4118"
    assert cells(done.stdout, "cce") == ["cce", "0", "1", "0.3333", "∞"]
    assert cells(done.stdout, "uniform") == ["uniform", "-", "1", "0", "1"]
    assert imread(tmp_path / "edfs.png").shape[1] == 1875


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_plot_writes_other_formats(tmp_path, suffix):
    assert invoke("plot", "cce", "-o", tmp_path / f"edfs.{suffix}").exit_code == 0
    assert (tmp_path / f"edfs.{suffix}").stat().st_size > 1000


def test_a_picture_without_a_suffix_is_a_png_and_called_so(tmp_path):
    done = invoke("plot", "cce", "-o", tmp_path / "edfs")
    assert done.stdout.rstrip().endswith(f"written to {tmp_path / 'edfs.png'}")
    assert (tmp_path / "edfs.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cce", "-o", ""], "error: cannot write .: "),
        (["cce", "-o", ".."], "error: cannot write ..: it is a folder"),
        (["dn:beta=8,lambd=0.5"], "error: unknown EDF 'dn'; did you mean 'dm'? Known: dm, "),
        (["cce", "gce:q=7"], "error: GCE: expected 0 < q <= 1, got 7.0"),
        (["dm:beta=8"], "expected a value for lambd"),
        (["cce", "-o", "edfs.docx"], "error: cannot write edfs.docx: "),
        (["cce", "-o", "nowhere/edfs.png"], "error: cannot write nowhere/edfs.png: "),
    ],
)
def test_plot_fails_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("plot", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_edfs_lists_the_catalogue():
    done = invoke("edfs")
    assert done.exit_code == 0
    assert cells(done.stdout, "dm:beta=·,lambd=·")[1].startswith("The EDF of derivative manipulation: w(p) = exp(beta")
    assert cells(done.stdout, "gce:q=0.7")
    assert done.stdout.count("w(p) =") == len(edf.CATALOGUE)
    for name in (kind.__name__.lower() for kind in edf.CATALOGUE):
        assert any(line.strip("│ ").startswith(name) for line in done.stdout.splitlines()), name


def test_env_is_the_report():
    done = invoke("env")
    assert done.exit_code == 0
    assert done.stdout == fused_dm.environment_report() + "\n"


def texts(figure):
    return [text for axes in figure.axes for text in axes.texts if text.get_text()]


@pytest.mark.parametrize(
    "names",
    [GALLERY, ["uniform"], ["dm:beta=5000,lambd=1", "cce", "selfpacedlinear:threshold=2", "max(0.25*gce:q=0.7*mae+cce,0.125)"]],
    ids=len,
)
def test_picture_is_legible(names):
    figure = draw_edfs([edf.parse(name) for name in names])
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y0 >= 0, text
        assert box.y1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)
    shown = {text.replace("\n", "") for text, _ in boxes}
    assert set(names) <= shown


def test_picture_of_every_kind_of_edf(tmp_path):
    defaults = {"alpha": 0.5, "eta": 0.5, "psi": 0.5, "beta": 5000.0, "lambd": 1.0}
    for kind in edf.CATALOGUE:
        needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
        draw_edfs([kind(**{name: defaults.get(name, 2.0) for name in needed})], tmp_path / "edf.png")


@pytest.mark.skipif(
    tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11),
    reason="drawn by matplotlib 3.11, others place text otherwise",
)
def test_gallery_is_drawn_by_the_command_that_is_given(tmp_path):
    (command,) = re.findall(r"fused-dm (plot .*) -o docs/edf_gallery.png", (ROOT / "docs" / "choosing-an-edf.md").read_text())
    assert command.split()[1:] == GALLERY
    assert invoke(*command.split(), "-o", tmp_path / "gallery.png").exit_code == 0
    drawn, committed = imread(tmp_path / "gallery.png"), imread(ROOT / "docs" / "edf_gallery.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 1e-3


def test_modes_are_marked_where_the_density_is_largest():
    figure = draw_edfs([edf.parse(name) for name in [*GALLERY, "truncatedgce", "selfpaced:threshold=1"]])
    for axes in figure.axes[:2]:
        lines = axes.get_lines()
        for curve, mark in zip(lines[::2], lines[1::2], strict=True):
            ((mode,), (peak,)) = mark.get_data()
            assert peak == pytest.approx(max(curve.get_ydata()), rel=2e-3)
            assert mode == pytest.approx(curve.get_xdata()[curve.get_ydata().argmax()], abs=1e-3)
    weights, densities = (axes.get_lines()[0::2] for axes in figure.axes[:2])
    assert weights[0].get_ydata()[0] == pytest.approx(2)
    for line in densities:
        y = line.get_ydata()
        assert (y[1:] + y[:-1]).sum() / 2 / (len(y) - 1) == pytest.approx(1, rel=1e-3)


BARE = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
sys.argv[1:] = {arguments!r}
"""


def run_without(tmp_path, missing, program, arguments=()):
    code = BARE.format(missing=missing, arguments=list(arguments)) + program
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )


COMMAND = "import runpy\nrunpy.run_module('fused_dm', run_name='__main__', alter_sys=True)\n"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["typer", "rich"], "error: fused-dm needs typer and rich: pip install typer rich (the extra 'cli' of fused_dm)"),
        (["matplotlib"], "error: fused-dm plot needs matplotlib: pip install matplotlib (the extra 'plot' of fused_dm)"),
    ],
)
def test_missing_packages_are_named_with_the_command(tmp_path, missing, message):
    done = run_without(tmp_path, missing, COMMAND, ["plot", "cce"])
    assert done.returncode != 0
    assert done.stderr.strip() == message


def test_python_m(tmp_path):
    done = run_without(tmp_path, ["matplotlib"], COMMAND, ["env"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fused_dm: {fused_dm.__version__}\n")


def test_import_and_report_need_none_of_them(tmp_path):
    program = (
        "import torch, fused_dm\n"
        "target = torch.zeros(2, dtype=torch.int64)\n"
        "output = fused_dm.dm_loss(torch.zeros(2, 3), target, 'cce', return_output=True)\n"
        "report = fused_dm.emphasis_report(output, target)\n"
        "print(str(report)[:10])\n"
        "fused_dm.environment_report()\n"
        "try:\n"
        "    report.plot('report.png')\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    done = run_without(tmp_path, ["matplotlib", "typer", "rich"], program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 examples",
        "EmphasisReport.plot needs matplotlib: pip install matplotlib (the extra 'plot' of fused_dm)",
    ]
