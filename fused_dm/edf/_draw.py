"""`plot`: a picture of EDFs, functions of the user's among them."""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._extras import require
from ._density import EDF
from ._measure import of_rows
from ._names import parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class _Function(EDF):
    """A function of the user's, to be measured and drawn."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        """There are no numbers to check."""

    def __str__(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def params(self) -> tuple[float, ...]:
        return ()

    def log_weight(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return of_rows(self.function)(log_p, log_q)


def _edf(emphasis: Any) -> EDF:
    if isinstance(emphasis, str):
        return parse(emphasis)
    if isinstance(emphasis, EDF) and type(emphasis) is not EDF:
        return emphasis
    if callable(emphasis) and not isinstance(emphasis, type):
        return _Function(emphasis)
    raise TypeError(f"plot: expected EDFs, their names or functions log_weight(log_p, log_q), got {emphasis!r}")


def plot(*emphases: EDF | str | Callable[[Tensor, Tensor], Tensor], path: "str | os.PathLike[str] | None" = None) -> "Figure":
    """Draw w(p), on a logarithmic scale, and the density w(p) / (integral of w) of EDFs, with their modes marked.

    Args:
        emphases: EDFs, names such as "dm:beta=8,lambd=0.5", or functions log_weight(log_p, log_q); one at least.
        path: where to write the picture, in the format of its suffix, png without one; None to write none.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: an argument is none of these.
        ValueError: there is none, a name is not known, a function returns something else than it should, `path` is a folder,
            or its suffix is that of no format.
        ModuleNotFoundError: matplotlib is not installed; the message names the command that installs it.

    Example:
        >>> from fused_dm import edf
        >>> figure = edf.plot("cce", edf.DM(beta=8, lambd=0.5), lambda log_p, log_q: 2 * log_q)
    """
    densities = [_edf(emphasis) for emphasis in emphases]
    if not densities:
        raise ValueError("plot: expected one EDF at least")
    if path is not None and os.path.isdir(path):
        raise ValueError(f"plot: expected path to be a file to write, got the folder {os.fspath(path)!r}")
    require("edf.plot", "plot", "matplotlib")
    from .. import _plot

    return _plot.draw_edfs(densities, path)
