"""The demonstration in examples/, at a small size: what it is given, what it computes and what it writes."""

import importlib
import importlib.metadata
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console

from fused_dm import edf

EXAMPLES = Path(__file__).parent.parent / "examples"
METHODS = ["cross entropy", "GCE", "DM"]


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("noisy_labels")


def synthetic_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images like MNIST's in shape and dtype: a pattern for each class, under noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(5000) % 10
    patterns = rng.integers(0, 2, (10, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
    images = 128 * patterns[labels] + rng.integers(0, 128, (5000, 28, 28))
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def images_and_labels(demo) -> tuple[np.ndarray, np.ndarray]:
    try:
        return demo.load_mnist()
    except importlib.metadata.PackageNotFoundError:
        return synthetic_digits()


@pytest.fixture(scope="module")
def digits(demo, images_and_labels):
    return demo.split(*images_and_labels)


@pytest.fixture(scope="module")
def settings(demo):
    return demo.Settings(epochs=2, noise=0.4, batch_size=25)


@pytest.fixture(scope="module")
def written(demo, digits, settings, tmp_path_factory):
    """The folder and the table as printed, after the whole demonstration with one seed."""
    half = digits._replace(train_images=digits.train_images[::2], train_labels=digits.train_labels[::2])
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    console = Console(record=True, width=100)
    demo.run_demo(half, settings, seeds=1, output=folder, workers=1, console=console)
    return folder, console.export_text()


@pytest.fixture(scope="module")
def results(written):
    return json.loads((written[0] / "results.json").read_text(encoding="utf-8"))


def test_data_are_digits(images_and_labels):
    images, labels = images_and_labels
    assert images.shape == (5000, 28, 28)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10


def test_split_is_fixed_stratified_and_disjoint(demo, digits, images_and_labels):
    assert np.bincount(digits.train_labels).tolist() == [400] * 10
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
    train = {image.tobytes() for image in digits.train_images}
    assert train.isdisjoint(image.tobytes() for image in digits.test_images)
    label_of = dict(zip((image.tobytes() for image in images_and_labels[0]), images_and_labels[1], strict=True))
    assert all(label_of[image.tobytes()] == y for image, y in zip(digits.train_images, digits.train_labels, strict=True))
    assert all(label_of[image.tobytes()] == y for image, y in zip(digits.test_images, digits.test_labels, strict=True))
    again = demo.split(*images_and_labels)
    assert all(np.array_equal(one, other) for one, other in zip(digits, again, strict=True))


@pytest.mark.parametrize("noise", [0, 0.2, 0.4, 1])
def test_noise_has_the_exact_rate_and_only_other_classes(demo, digits, noise):
    labels = digits.train_labels.copy()
    noisy = demo.mislabel(labels, noise, np.random.default_rng(1))
    assert np.array_equal(labels, digits.train_labels)
    assert (noisy != labels).sum() == round(noise * len(labels))
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_noise_is_symmetric(demo):
    labels = np.zeros(90_000, dtype=np.int64)
    counts = np.bincount(demo.mislabel(labels, 1, np.random.default_rng(0)), minlength=10)
    assert counts[0] == 0
    # Nine counts of a binomial law, with a standard deviation of 94: each within five of its mean.
    assert abs(counts[1:] - 10_000).max() < 5 * math.sqrt(90_000 * (1 / 9) * (8 / 9))


@pytest.mark.parametrize("name", METHODS)
def test_training_is_repeatable_and_reports_what_each_example_received(demo, digits, name):
    settings = demo.Settings(epochs=1, noise=0.4, batch_size=100)
    small = digits._replace(train_images=digits.train_images[::8], train_labels=digits.train_labels[::8])
    run, again = (demo.train(name, 3, small, settings) for _ in range(2))
    assert run.test_accuracy == again.test_accuracy
    assert np.array_equal(run.target_prob, again.target_prob)
    assert np.array_equal(run.example_weight, again.example_weight)
    assert run.mislabelled.sum() == 200
    weight = demo.METHODS[name].emphasis.weight(torch.from_numpy(run.target_prob)).numpy()
    if demo.METHODS[name].reduction == "mean":
        np.testing.assert_allclose(run.example_weight, weight / 100, rtol=1e-5)
    else:
        # Every batch is normalised to 1, and there are five of them.
        np.testing.assert_allclose(run.example_weight.sum(), 5, rtol=1e-5)
    emphasis = run.example_weight[run.mislabelled].sum() / run.example_weight.sum()
    np.testing.assert_allclose(run.mislabelled_emphasis, [emphasis], rtol=1e-5)


def test_seeds_and_methods_share_what_they_should(demo, digits, settings):
    small = digits._replace(train_images=digits.train_images[:200], train_labels=digits.train_labels[:200])
    short = demo.Settings(epochs=1, batch_size=200)
    first, second = (demo.train("DM", seed, small, short) for seed in (0, 1))
    other = demo.train("cross entropy", 0, small, short)
    assert not np.array_equal(first.mislabelled, second.mislabelled)
    assert np.array_equal(first.mislabelled, other.mislabelled)
    # One batch: both saw the initial network, which is therefore the same one. The losses round differently.
    np.testing.assert_allclose(first.target_prob, other.target_prob, rtol=1e-4)


def test_results_have_the_settings_and_versions(results, settings):
    assert results["settings"]["epochs"] == settings.epochs
    assert results["settings"]["noise"] == settings.noise
    assert results["settings"]["batch_size"] == settings.batch_size
    assert results["settings"]["seeds"] == [0]
    assert results["settings"]["train_examples"] == 2000
    assert results["settings"]["test_examples"] == 1000
    for package in ("fused_dm", "torch", "numpy"):
        assert results["versions"][package]
    assert results["seconds"] > 0
    assert list(results["methods"]) == METHODS
    assert [edf.parse(method["emphasis"]) for method in results["methods"].values()] == [
        edf.CCE(),
        edf.GCE(q=0.7),
        edf.DM(beta=16, lambd=1),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_results_are_consistent(results, settings, name):
    method = results["methods"][name]
    (run,) = method["runs"]
    assert run["mislabelled_examples"] == round(settings.noise * 2000)
    assert len(run["test_accuracy"]) == settings.epochs
    last, best = run["test_accuracy"][-1], max(run["test_accuracy"])
    assert method["final_accuracy"] == {"mean": last, "std": 0, "min": last, "max": last}
    assert method["best_accuracy"] == {"mean": best, "std": 0, "min": best, "max": best}
    assert method["clean_emphasis"]["mean"] + method["mislabelled_emphasis"]["mean"] == pytest.approx(1)
    for clean, mislabelled in zip(run["clean_emphasis"], run["mislabelled_emphasis"], strict=True):
        assert clean + mislabelled == pytest.approx(1)
    for shares in method["target_prob"].values():
        assert sum(shares) == pytest.approx(1)
    assert method["memorised"]["mean"] == pytest.approx(sum(method["target_prob"]["mislabelled"][10:]), abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(results, name):
    """Chance is 0.1, with a standard deviation of 0.01 over 1000 test digits."""
    assert results["methods"][name]["final_accuracy"]["mean"] > 0.3


def test_spread(demo):
    assert demo.spread([0.5, 0.7, 0.9]) == pytest.approx({"mean": 0.7, "std": 0.2, "min": 0.5, "max": 0.9})


def test_tables_show_the_results(written, results):
    folder, printed = written
    rows = [line for line in (folder / "table.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METHODS)
    for row, method in zip(rows[2:], results["methods"].values(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == method["label"]
        assert cells[1] == f"{100 * method['final_accuracy']['mean']:.1f} ± 0.0"
        assert cells[4] == f"{100 * method['mislabelled_emphasis']['mean']:.1f}"
        (line,) = (line for line in printed.splitlines() if method["label"] in line)
        assert all(cell in line for cell in cells)


@pytest.fixture(scope="module")
def figure(demo, results):
    figure = demo.report.make_figure(results)
    figure.draw_without_rendering()
    return figure


def visible_texts(figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def test_labels_are_moved_apart_and_keep_their_order(demo):
    assert demo.report.apart([0.8, 0.2, 0.81], [0.1, 0.1, 0.1], top=1) == pytest.approx([0.8, 0.2, 0.9])
    assert demo.report.apart([0.9, 0.2, 0.91], [0.1, 0.1, 0.2], top=1) == pytest.approx([0.75, 0.2, 0.9])


def test_picture_is_written_in_full_size(written):
    path = written[0] / "noisy_labels.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert imread(path).shape[:2] == (840, 1800)


def test_picture_shows_the_results(figure, results):
    shown = [text.get_text().replace("\n", " ") for text in visible_texts(figure)]
    for name, method in results["methods"].items():
        assert f"{name} {100 * method['final_accuracy']['mean']:.1f} %" in shown
        assert f"{100 * method['memorised']['mean']:.0f} % of wrong labels memorised" in shown
        assert f"{100 * method['mislabelled_emphasis']['mean']:.0f} %" in shown
    curves = {tuple(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()}
    for method in results["methods"].values():
        assert tuple(method["runs"][0]["test_accuracy"]) in curves
    widths = {round(bar.get_width(), 6) for bar in figure.axes[-1].patches}
    for group in ("clean", "mislabelled"):
        assert {round(method[f"{group}_emphasis"]["mean"], 6) for method in results["methods"].values()} <= widths


def test_picture_has_no_text_upon_text_or_beyond_its_edge(figure):
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)


def test_options(demo, digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "load_mnist", synthetic_digits)
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: calls.append(arguments))
    options = ["--seeds", "3", "--epochs", "2", "--noise", "0.2", "--workers", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["noisy_labels.py", *options])
    demo.main()
    _, settings, seeds, output, workers, _ = calls[0]
    assert (settings.epochs, settings.noise, seeds, workers, output) == (2, 0.2, 3, 1, tmp_path)


@pytest.mark.parametrize("option", [["--seeds", "0"], ["--epochs", "-1"], ["--noise", "1.5"], ["--noise", "nan"]])
def test_senseless_options_are_refused(demo, monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["noisy_labels.py", *option])
    with pytest.raises(SystemExit):
        demo.main()
    assert option[0] in capsys.readouterr().err
