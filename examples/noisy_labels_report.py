"""The table and the picture of noisy_labels.py, made of what its results.json holds."""

import itertools
import math

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table

METHOD_COLORS = {"cross entropy": "#4d4d4d", "GCE": "#009e73", "DM": "#0072b2"}
RIGHT, WRONG = "#b9c6d3", "#e58a00"
NOTE = "#666666"
RIGHT_TEXT, WRONG_TEXT = "#5a6f85", "#b25e00"
WEIGHT_LABELS = {"cross entropy": (0.01, 1.06), "GCE": (0.75, 0.76), "DM": (0.46, 0.72)}
STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "xtick.major.pad": 6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def mean_and_deviation(values: dict[str, float]) -> str:
    return f"{100 * values['mean']:.1f} ± {100 * values['std']:.1f}"


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    header = ["method", "final accuracy", "min-max", "best epoch", "emphasis on wrong labels", "wrong labels memorised"]
    rows = []
    for method in results["methods"].values():
        final = method["final_accuracy"]
        rows.append(
            [
                method["label"],
                mean_and_deviation(final),
                f"{100 * final['min']:.1f}-{100 * final['max']:.1f}",
                mean_and_deviation(method["best_accuracy"]),
                f"{100 * method['mislabelled_emphasis']['mean']:.1f}",
                f"{100 * method['memorised']['mean']:.1f}",
            ]
        )
    return header, rows


def caption(results: dict) -> str:
    settings = results["settings"]
    return (
        "In %; GCE(q), DM(beta, lambd). "
        f"{settings['train_examples']} training digits, {percent(settings['noise'])} of them with a wrong label, and "
        f"{settings['test_examples']} clean test digits; {settings['epochs']} epochs; mean ± standard deviation over "
        f"{len(settings['seeds'])} seeds. Best epoch: a run's greatest test accuracy, which only clean labels can tell. "
        "Emphasis: the L1 norm of the gradients, in the last epoch. Memorised: p > 1/2, in the last epoch."
    )


def markdown_table(results: dict) -> str:
    header, rows = table_rows(results)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{caption(results)}\n"


def rich_table(results: dict) -> Table:
    header, rows = table_rows(results)
    table = Table(caption=caption(results), caption_justify="left")
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def apart(middles: list[float], sizes: list[float], top: float) -> list[float]:
    """Where to put labels of these middles and sizes so that none covers another and none is above `top`, in their order."""
    moved = list(middles)
    order = sorted(range(len(middles)), key=middles.__getitem__)
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + (sizes[lower] + sizes[upper]) / 2)
    for label in reversed(order):
        moved[label] = min(moved[label], top - sizes[label] / 2)
        top = moved[label] - sizes[label] / 2
    return moved


def head(axes: Axes, title: str, *notes: tuple[str, str]) -> None:
    """A title above the axes and, below it, notes of (text, color) from left to right."""
    axes.annotate(title, (0, 1), (0, 28), "axes fraction", "offset points", size=13.5, weight="bold")
    for index, (note, color) in enumerate(notes):
        place = {"ha": "right" if index else "left", "color": color}
        axes.annotate(note, (index, 1), (0, 11), "axes fraction", "offset points", **place)


def draw_accuracy(axes: Axes, results: dict) -> None:
    curves = {name: [run["test_accuracy"] for run in method["runs"]] for name, method in results["methods"].items()}
    epochs = range(1, results["settings"]["epochs"] + 1)
    ends = []
    for name, runs in curves.items():
        by_epoch = list(zip(*runs, strict=True))
        mean = [sum(values) / len(values) for values in by_epoch]
        least, greatest = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, least, greatest, color=METHOD_COLORS[name], alpha=0.2, linewidth=0)
        axes.plot(epochs, mean, color=METHOD_COLORS[name], linewidth=2.5)
        ends.append(mean[-1])
    bottom = max(0.0, math.floor(10 * min(run[-1] for runs in curves.values() for run in runs) - 1) / 10)
    labels = [name.replace(" ", "\n") + f" {100 * end:.1f} %" for name, end in zip(curves, ends, strict=True)]
    heights = apart(ends, [0.06 * (1 - bottom) * len(label.splitlines()) for label in labels], top=1)
    for name, label, height in zip(curves, labels, heights, strict=True):
        place = {"va": "center", "annotation_clip": False, "weight": "bold", "color": METHOD_COLORS[name]}
        axes.annotate(label, (epochs[-1], height), (6, 0), textcoords="offset points", **place)
    head(axes, "Accuracy on clean test digits", (f"mean and range of {len(results['settings']['seeds'])} seeds", NOTE))
    axes.set_xlabel("epoch")
    axes.set_xlim(0, epochs[-1])
    axes.set_ylim(bottom, 1)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="#e8e8e8")


def draw_probabilities(column: list[Axes], results: dict) -> None:
    for axes, (name, method) in zip(column, results["methods"].items(), strict=True):
        clean, mislabelled = method["target_prob"]["clean"], method["target_prob"]["mislabelled"]
        greatest = max(*clean, *mislabelled)
        width = 1 / len(clean)
        middles = [(index + 0.5) * width for index in range(len(clean))]
        axes.bar(middles, [share / greatest for share in clean], 0.88 * width, color=RIGHT)
        axes.bar(middles, [-share / greatest for share in mislabelled], 0.88 * width, color=WRONG)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=axes is column[-1])
        axes.text(0.0, 0.94, name, color=METHOD_COLORS[name], weight="bold", va="top")
        memorised = f"{percent(method['memorised']['mean'])} of wrong labels memorised"
        axes.text(1, -0.68, memorised, color=WRONG_TEXT, ha="right", va="center")
    head(column[0], "What the network believes", ("wrong labels down", WRONG_TEXT), ("right labels up", RIGHT_TEXT))
    column[-1].set_xlabel("probability p of the given label")


def draw_weights(axes: Axes, results: dict) -> None:
    for name, method in results["methods"].items():
        p, weight = method["weight_curve"]["p"], method["weight_curve"]["weight"]
        axes.plot(p, [value / max(weight) for value in weight], color=METHOD_COLORS[name], linewidth=2.5)
        axes.text(*WEIGHT_LABELS[name], name, color=METHOD_COLORS[name], weight="bold")
    head(axes, "How much a label counts", ("weight w(p), scaled to a peak of 1", NOTE))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.22)
    axes.set_xlabel("probability p of the given label")
    axes.set_yticks([])


def draw_shares(axes: Axes, results: dict) -> None:
    methods, noise = results["methods"], results["settings"]["noise"]
    left = -0.75
    for row, (name, method) in enumerate(methods.items()):
        wrong, right = method["mislabelled_emphasis"]["mean"], method["clean_emphasis"]["mean"]
        axes.barh(row, wrong, 0.8, color=WRONG)
        axes.barh(row, right, 0.8, left=wrong, color=RIGHT)
        axes.text(0.03, row, percent(wrong), va="center_baseline", weight="bold")
        axes.text(left, row, name, va="center_baseline", weight="bold", color=METHOD_COLORS[name])
    axes.axvline(noise, color="#222222", linestyle=(0, (2, 2)), linewidth=1.2)
    axes.text(noise, len(methods) - 0.35, f"{percent(noise)} of the labels", ha="center", va="top", color=NOTE)
    axes.text(left, -0.65, "emphasis that wrong labels get", color=WRONG_TEXT)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(methods) - 0.4, -0.5)
    axes.axis("off")


def make_figure(results: dict) -> Figure:
    """The picture: three panels side by side, to be read at a width of 900 pixels or more."""
    settings = results["settings"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.6), dpi=150, facecolor="white")
        title = f"MNIST digits, {percent(settings['noise'])} of the training labels wrong: one network, three losses"
        figure.text(0.012, 0.945, title, size=18.5, weight="bold")
        bounds = {"bottom": 0.115, "top": 0.775}
        draw_accuracy(figure.add_gridspec(1, 1, left=0.055, right=0.252, **bounds).subplots(), results)
        middle = figure.add_gridspec(3, 1, left=0.395, right=0.66, hspace=0.15, **bounds)
        draw_probabilities(list(middle.subplots()), results)
        draw_weights(figure.add_axes((0.725, 0.45, 0.263, 0.325)), results)
        draw_shares(figure.add_axes((0.838, 0.055, 0.15, 0.2)), results)
    return figure
