"""The commands of `fused-dm`. Only this module needs typer and rich, and only its `plot` matplotlib."""

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import edf
from ._environment import environment
from ._extras import require

app = typer.Typer(
    name="fused-dm",
    help="Emphasis density functions: see them, list them, and say what machine they run on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fail(message: object) -> typer.Exit:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble(("error: ", "bold red"), str(message)))
    return typer.Exit(2)


@app.command()
def plot(
    edfs: Annotated[list[str], typer.Argument(metavar="EDF...", help="Such as dm:beta=8,lambd=0.5 or gce:q=0.7 or cce.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture; its suffix is the format: png, svg or pdf.")
    ] = Path("edfs.png"),
) -> None:
    """Draw w(p) and the density h(p) of EDFs, and print mode, integral, variance and peak ratio."""
    try:
        densities = [edf.parse(text) for text in edfs]
        require("fused-dm plot", "plot", "matplotlib")
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise _fail(error) from None
    from . import _plot

    if output.is_dir():
        raise _fail(f"cannot write {output}: it is a folder")
    try:
        # What a picture without a suffix is, and is called.
        output = output if output.suffix else output.with_suffix(".png")
        _plot.draw_edfs(densities, output)
    except (OSError, ValueError) as error:
        raise _fail(f"cannot write {output}: {error}") from None
    table = Table(caption="of w(p) for p uniform in (0, 1); peak ratio: greatest w over least", caption_justify="left")
    table.add_column("EDF", overflow="fold")
    for column in ("mode", "integral", "variance", "peak ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for density in densities:
        figures = (_plot.mode(density), density.integral, density.variance, density.peak_ratio)
        table.add_row(str(density), *map(_plot.number, figures))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"written to {output}", soft_wrap=True, markup=False)


def _form(kind: type[edf.EDF]) -> str:
    """How the text of an EDF looks: its name and parameters, with their defaults or a dot for a number that must be given."""
    fields = (
        f"{field.name}={'·' if field.default is dataclasses.MISSING else f'{field.default:g}'}"
        for field in dataclasses.fields(kind)
    )
    return ":".join(filter(None, (kind.__name__.lower(), ",".join(fields))))


def _formula(kind: type[edf.EDF]) -> str:
    """The first paragraph of the docstring, and where w(p) = ... stands if that isn't in it."""
    first, *rest = (inspect.getdoc(kind) or "").split("\n\n")
    lines = [line for paragraph in rest for line in paragraph.splitlines() if line.strip().startswith("w(p) =")]
    return " ".join([*first.split(), *([] if "w(p) =" in first else lines[0].split() if lines else [])])


@app.command()
def edfs() -> None:
    """List the catalogue: the text of each EDF, with the defaults, and its formula."""
    table = Table(caption="· stands for a number. Sums and products work too: 0.1*cce+4*mae", caption_justify="left")
    table.add_column("EDF", no_wrap=True)
    table.add_column("formula", overflow="fold")
    for kind in edf.CATALOGUE:
        table.add_row(_form(kind), _formula(kind))
    Console(highlight=False).print(table, markup=False)


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, devices, implementations."""
    for name, value in environment().items():
        Console(highlight=False).print(f"{name}: {value}", soft_wrap=True, markup=False)
