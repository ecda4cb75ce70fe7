"""What a batch received: `emphasis_report`."""

import dataclasses
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._api import DMOutput
from ._extras import require
from ._linear import LinearDMOutput
from ._validation import check_ignore_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class EmphasisShare:
    """A part of a batch.

    Attributes:
        name: which examples.
        examples: how many.
        example_share: their share of all examples, 0 to 1.
        emphasis_share: their share of all emphasis, the sum of |c| w, 0 to 1; nan where the batch has none.
        mean_prob: the mean of their p, nan where there are none.
    """

    name: str
    examples: int
    example_share: float
    emphasis_share: float
    mean_prob: float

    @property
    def relative(self) -> float:
        """How much each of them counts, as a multiple of the batch's average."""
        return self.emphasis_share / self.example_share if self.examples else math.nan


@dataclasses.dataclass(frozen=True)
class EmphasisReport:
    """What the examples of a batch received; `str()` is a table. See `emphasis_report`.

    Attributes:
        examples: the examples that are counted in everything below.
        ignored: those whose target is `ignore_index`.
        not_finite: those with nan or inf as p or weight, by nan or inf among the logits; counted in nothing else.
        effective_examples: (sum w)^2 / sum w^2, the number of equally weighted examples that would average as well.
        half: the least share of the examples that together have half of the emphasis.
        parts: the batch by difficulty, by prediction and, where `noisy` was given, by label.
        edges: of the bins of p, from 0 to 1.
        density: of p, one value a bin; times the bin's width it is the share of the examples.
        emphasis_density: likewise, of the emphasis.
        noisy_density, noisy_emphasis_density: what of these two belongs to noisy labels, or None.
    """

    examples: int
    ignored: int
    not_finite: int
    effective_examples: float
    half: float
    parts: tuple[EmphasisShare, ...]
    edges: tuple[float, ...]
    density: tuple[float, ...]
    emphasis_density: tuple[float, ...]
    noisy_density: tuple[float, ...] | None
    noisy_emphasis_density: tuple[float, ...] | None

    def __getitem__(self, name: str) -> EmphasisShare:
        """The part of this name, such as report["hard"]."""
        for part in self.parts:
            if part.name.split(",")[0] == name:
                return part
        raise KeyError(f"{name!r}; known: {', '.join(part.name.split(',')[0] for part in self.parts)}")

    def __str__(self) -> str:
        left_out = [f"{count} {name}" for count, name in ((self.ignored, "ignored"), (self.not_finite, "not finite")) if count]
        counts = f"{self.examples} examples" + (f" ({', '.join(left_out)})" if left_out else "")
        lines = [
            f"{counts}; half of the emphasis is on {_percent(self.half)} of them, and the effective number is "
            f"{self.effective_examples:.1f}",
            f"{'':24}{'examples':>9}{'share':>8}{'emphasis':>10}{'each':>8}{'mean p':>9}",
        ]
        for part in self.parts:
            each = "-" if math.isnan(part.relative) else f"x {part.relative:.2f}"
            mean = "-" if math.isnan(part.mean_prob) else f"{part.mean_prob:.3f}"
            lines.append(
                f"{part.name:24}{part.examples:9}{_percent(part.example_share):>8}{_percent(part.emphasis_share):>10}"
                f"{each:>8}{mean:>9}"
            )
        return "\n".join(lines)

    def plot(self, where: "str | os.PathLike | Axes") -> "Figure":
        """Draw the density of p and, over it, where the emphasis went.

        Args:
            where: a path to write a picture to, in the format of its suffix, or the matplotlib axes to draw the densities in.

        Returns:
            The matplotlib figure.

        Raises:
            TypeError: `where` is neither.
            ValueError: it is a folder.
            ModuleNotFoundError: matplotlib is not installed; the message names the command that installs it.
        """
        if where is None or isinstance(where, (int, float)):
            raise TypeError(f"where: expected a path or matplotlib axes, got {where!r}")
        if isinstance(where, (str, os.PathLike)) and os.path.isdir(where):
            raise ValueError(f"where: expected a file to write or matplotlib axes, got the folder {os.fspath(where)!r}")
        require("EmphasisReport.plot", "plot", "matplotlib")
        from . import _plot

        return _plot.draw_report(self, where)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _check(
    output: DMOutput | LinearDMOutput,
    target: Tensor,
    noisy: Tensor | None,
    ignore_index: int,
    thresholds: tuple[float, float],
    bins: int,
) -> None:
    if not isinstance(output, (DMOutput, LinearDMOutput)):
        raise TypeError(f"output: expected a DMOutput, as a loss returns with return_output=True, got {type(output).__name__}")
    shape = tuple(output.target_prob.shape)
    for name, value in (("target", target), ("noisy", noisy)):
        if value is None and name == "noisy":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, that of the output's rows, got {tuple(value.shape)}")
    if target.dtype.is_floating_point or target.dtype.is_complex:
        raise TypeError(f"target: expected labels of an integer dtype, got {target.dtype}")
    if noisy is not None and noisy.dtype != torch.bool:
        raise TypeError(f"noisy: expected dtype bool, True where the label is wrong, got {noisy.dtype}")
    pair = isinstance(thresholds, (tuple, list)) and len(thresholds) == 2
    if not pair or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in thresholds):
        raise TypeError(f"thresholds: expected two numbers, got {thresholds!r}")
    if not 0 < thresholds[0] <= thresholds[1] < 1:
        raise ValueError(f"thresholds: expected 0 < hard <= easy < 1, got {thresholds}")
    check_ignore_index(ignore_index)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected a number of at least 1, got {bins!r}")


@torch.no_grad()
def emphasis_report(
    output: DMOutput | LinearDMOutput,
    target: Tensor,
    noisy: Tensor | None = None,
    *,
    ignore_index: int = -100,
    thresholds: tuple[float, float] = (1 / 3, 2 / 3),
    bins: int = 20,
) -> EmphasisReport:
    """What a real batch received: the density of p, and which share of all emphasis went to which part of it.

    The emphasis of an example is the magnitude of its `example_weight`, |c| w / D: at eps = 0 the L1 norm of its gradient with
    respect to its logits. A part's share is

        share(part) = sum_{i in part} |c_i| w_i / sum_i |c_i| w_i

    over the examples that are not ignored. The numbers are brought to the CPU, which waits for a GPU; report now and then.

    Args:
        output: what `dm_loss`, `linear_dm_loss` or their modules returned under `return_output=True`.
        target: the labels that the loss was given, shaped like `output.target_prob`.
        noisy: bool, shaped like `target`, True where the label is known to be wrong.
        ignore_index: that of the loss.
        thresholds: the p below which an example is hard, and from which on it is easy; in (0, 1).
        bins: of the densities, of equal width, at least 1.

    Returns:
        An EmphasisReport: numbers, with a text table as `str()` and a picture by `plot(path)`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or range.

    Example:
        >>> import torch
        >>> from fused_dm import dm_loss, emphasis_report
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0], [-3.0, 4.0, -2.0]])
        >>> target = torch.tensor([0, 1, 2, 1])
        >>> output = dm_loss(logits, target, "dm:beta=8,lambd=0.5", return_output=True)
        >>> print(emphasis_report(output, target, noisy=torch.tensor([False, True, False, False])))
        4 examples; half of the emphasis is on 25.0 % of them, and the effective number is 2.7
                                 examples   share  emphasis    each   mean p
        hard, p < 0.333                 1  25.0 %    25.7 %  x 1.03    0.114
        middling                        2  50.0 %    71.9 %  x 1.44    0.499
        easy, p >= 0.667                1  25.0 %     2.4 %  x 0.10    0.997
        correct                         3  75.0 %    74.3 %  x 0.99    0.665
        incorrect                       1  25.0 %    25.7 %  x 1.03    0.114
        clean labels                    3  75.0 %    74.3 %  x 0.99    0.665
        noisy labels                    1  25.0 %    25.7 %  x 1.03    0.114
    """
    _check(output, target, noisy, ignore_index, thresholds, bins)
    valid = target.reshape(-1).cpu() != ignore_index
    prob = output.target_prob.detach().reshape(-1).cpu().double()
    emphasis = output.example_weight.detach().reshape(-1).cpu().double().abs()
    finite = prob.isfinite() & emphasis.isfinite()
    counted = valid & finite
    prob, emphasis = prob[counted], emphasis[counted]
    if emphasis.any():
        # Shares do not depend on the size, and squares of it are to be in range.
        emphasis = emphasis / emphasis.max()
    correct = output.correct.detach().reshape(-1).cpu()[counted]
    total, number = emphasis.sum().item(), prob.numel()

    def share(name: str, mask: Tensor) -> EmphasisShare:
        count = int(mask.sum())
        return EmphasisShare(
            name=name,
            examples=count,
            example_share=count / number if number else math.nan,
            emphasis_share=emphasis[mask].sum().item() / total if total else math.nan,
            mean_prob=prob[mask].mean().item() if count else math.nan,
        )

    hard, easy = prob < thresholds[0], prob >= thresholds[1]
    parts = [
        share(f"hard, p < {thresholds[0]:.3g}", hard),
        share("middling", ~hard & ~easy),
        share(f"easy, p >= {thresholds[1]:.3g}", easy),
        share("correct", correct),
        share("incorrect", ~correct),
    ]
    slot = (prob * bins).long().clamp(max=bins - 1)

    def densities(mask: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        examples = torch.bincount(slot[mask], minlength=bins).double() * bins
        received = torch.bincount(slot[mask], weights=emphasis[mask], minlength=bins) * bins
        return tuple((examples / number).tolist()), tuple((received / total).tolist())

    density, emphasis_density = densities(torch.ones_like(hard))
    noisy_density, noisy_emphasis_density = None, None
    if noisy is not None:
        wrong = noisy.reshape(-1).cpu()[counted]
        parts += [share("clean labels", ~wrong), share("noisy labels", wrong)]
        noisy_density, noisy_emphasis_density = densities(wrong)
    running = emphasis.sort(descending=True).values.cumsum(0)
    return EmphasisReport(
        examples=number,
        ignored=int((~valid).sum()),
        not_finite=int((valid & ~finite).sum()),
        effective_examples=total**2 / emphasis.square().sum().item() if total else 0.0,
        half=(int((running < total / 2).sum()) + 1) / number if total else math.nan,
        parts=tuple(parts),
        edges=tuple(index / bins for index in range(bins + 1)),
        density=density,
        emphasis_density=emphasis_density,
        noisy_density=noisy_density,
        noisy_emphasis_density=noisy_emphasis_density,
    )
