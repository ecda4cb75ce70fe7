"""What a batch received, in numbers, text and picture, and the report on the environment."""

import dataclasses
import json
import math

import pytest
import torch
from batches import GPU, device_of, make
from matplotlib.figure import Figure
from matplotlib.image import imread

import fused_dm
from fused_dm import DMLoss, DMOutput, dm_loss, edf, emphasis_report

DM = edf.DM(beta=8, lambd=0.5)


def output_of(prob, weight, correct=None):
    prob, weight = torch.as_tensor(prob), torch.as_tensor(weight)
    correct = prob > 0.5 if correct is None else torch.as_tensor(correct)
    return DMOutput(torch.zeros(()), weight, prob, weight.double().sum(), correct)


def test_shares_of_a_batch_by_hand():
    output = output_of([0.11, 0.21, 0.51, 0.91], [1.0, 2.0, 4.0, 1.0])
    report = emphasis_report(output, torch.arange(4), torch.tensor([True, False, False, False]), bins=10)
    assert report.examples == 4
    assert report.effective_examples == pytest.approx(64 / 22)
    assert report.half == 0.25
    assert report["hard"].examples == 2
    assert report["hard"].example_share == 0.5
    assert report["hard"].emphasis_share == 0.375
    assert report["hard"].relative == 0.75
    assert report["hard"].mean_prob == pytest.approx(0.16)
    assert report["middling"].emphasis_share == 0.5
    assert report["easy"].emphasis_share == 0.125
    assert report["correct"].emphasis_share == 0.625
    assert report["noisy labels"].emphasis_share == 0.125
    assert report["clean labels"].example_share == 0.75
    assert report.density == (0, 2.5, 2.5, 0, 0, 2.5, 0, 0, 0, 2.5)
    assert report.emphasis_density == (0, 1.25, 2.5, 0, 0, 5, 0, 0, 0, 1.25)
    assert report.noisy_density == (0, 2.5, *[0] * 8)
    assert report.noisy_emphasis_density == (0, 1.25, *[0] * 8)
    with pytest.raises(KeyError, match="known: hard, middling, easy, correct, incorrect, clean labels, noisy labels"):
        report["soft"]


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
def test_shares_of_a_real_batch(impl, reduction):
    logits, target = make(200, 10, ignored=0.2)
    noisy = torch.arange(200) % 3 == 0
    device = device_of(impl)
    criterion = DMLoss(DM, impl=impl, reduction=reduction, return_output=True)
    output = criterion(logits.to(device), target.to(device))
    report = emphasis_report(output, target.to(device), noisy.to(device))
    p = logits.double().softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    weight = DM.weight(p) * (target != -100)
    assert report.ignored == int((target == -100).sum())
    assert report.examples + report.ignored == 200
    assert report["noisy labels"].emphasis_share == pytest.approx(float(weight[noisy].sum() / weight.sum()), rel=1e-4)
    assert report["easy"].emphasis_share == pytest.approx(float(weight[p >= 2 / 3].sum() / weight.sum()), rel=1e-4)
    groups = (("hard", "middling", "easy"), ("correct", "incorrect"), ("clean labels", "noisy labels"))
    for group in groups:
        assert sum(report[name].examples for name in group) == report.examples
        assert sum(report[name].emphasis_share for name in group) == pytest.approx(1)
    assert sum(report.density) / 20 == pytest.approx(1)
    assert sum(report.emphasis_density) / 20 == pytest.approx(1)


def test_equal_weights_count_alike():
    report = emphasis_report(output_of(torch.rand(8), torch.ones(8)), torch.arange(8))
    assert report.effective_examples == 8
    assert report.half == 0.5
    assert [part.name for part in report.parts][3:] == ["correct", "incorrect"]
    assert report.noisy_density is None


def test_a_negative_weight_is_as_much_emphasis():
    report = emphasis_report(output_of([0.1, 0.9], [-3.0, 1.0]), torch.arange(2))
    assert report["hard"].emphasis_share == 0.75


def test_rows_that_are_not_finite_are_told():
    logits = torch.zeros(4, 3)
    logits[1] = math.nan
    target = torch.tensor([0, 1, -100, 2])
    report = emphasis_report(dm_loss(logits, target, DM, reduction="none", return_output=True), target)
    assert (report.examples, report.ignored, report.not_finite) == (2, 1, 1)
    assert str(report).startswith("2 examples (1 ignored, 1 not finite);")


def test_nothing_to_report():
    target = torch.full((3,), -100)
    report = emphasis_report(dm_loss(torch.zeros(3, 4), target, DM, return_output=True), target, torch.zeros(3).bool())
    assert (report.examples, report.ignored) == (0, 3)
    assert math.isnan(report["hard"].emphasis_share)
    assert "-" in str(report)


def test_spatial_inputs_and_another_ignore_index():
    target = torch.randint(4, (2, 5, 3))
    output = dm_loss(torch.randn(2, 4, 5, 3), target, DM, ignore_index=1, return_output=True)
    report = emphasis_report(output, target, target == 0, ignore_index=1)
    assert report.ignored == int((target == 1).sum())
    assert report["noisy labels"].examples == int((target == 0).sum())


@pytest.mark.parametrize("normalizer", [1e200, 1e-200])
def test_the_size_of_the_divisor_does_not_matter(normalizer):
    logits, target = make(6, 9, torch.float64)
    far, near = (
        dm_loss(logits, target, DM, reduction="sum", normalizer=number, return_output=True) for number in (normalizer, 1.0)
    )
    assert str(emphasis_report(far, target)) == str(emphasis_report(near, target))


def test_is_a_value():
    output, target = output_of([0.1, 0.9], [1.0, 1.0]), torch.arange(2)
    assert emphasis_report(output, target) == emphasis_report(output, target)
    assert json.loads(json.dumps(dataclasses.asdict(emphasis_report(output, target))))["examples"] == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2), torch.arange(2)), {}, TypeError, r"output: expected a DMOutput.*return_output=True, got Tensor"),
        ((output_of([0.5], [1.0]), torch.arange(2)), {}, ValueError, r"target: expected shape \(1,\).*got \(2,\)"),
        ((output_of([0.5], [1.0]), [0]), {}, TypeError, r"target: expected a Tensor, got list"),
        (
            (output_of([0.5], [1.0]), torch.ones(1)),
            {},
            TypeError,
            r"target: expected labels of an integer dtype, got torch.float32",
        ),
        ((output_of([0.5], [1.0]), torch.arange(1), torch.ones(1)), {}, TypeError, r"noisy: expected dtype bool"),
        ((output_of([0.5], [1.0]), torch.arange(1), torch.ones(2) > 0), {}, ValueError, r"noisy: expected shape \(1,\)"),
        ((output_of([0.5], [1.0]), torch.arange(1)), {"bins": 0}, ValueError, r"bins: expected"),
        (
            (output_of([0.5], [1.0]), torch.arange(1)),
            {"thresholds": 0.5},
            TypeError,
            r"thresholds: expected two numbers, got 0.5",
        ),
        (
            (output_of([0.5], [1.0]), torch.arange(1)),
            {"thresholds": "ab"},
            TypeError,
            r"thresholds: expected two numbers",
        ),
        (
            (output_of([0.5], [1.0]), torch.arange(1)),
            {"ignore_index": "a"},
            TypeError,
            r"ignore_index: expected an int, got 'a'",
        ),
        ((output_of([0.5], [1.0]), torch.arange(1)), {"thresholds": (0.7, 0.3)}, ValueError, r"thresholds: expected"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        emphasis_report(*arguments, **options)


@pytest.mark.parametrize("noisy", [None, torch.arange(200) % 3 == 0], ids=["", "noisy"])
def test_picture(noisy, tmp_path):
    logits, target = make(200, 10)
    report = emphasis_report(dm_loss(logits, target, DM, return_output=True), target, noisy)
    figure = report.plot(tmp_path / "report.png")
    assert imread(tmp_path / "report.png").shape[:2] == (735, 1725)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for axes in figure.axes for text in axes.texts]
    assert len(boxes) > 10
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        for other, other_box in boxes[:index]:
            assert not box.overlaps(other_box), (text, other)
    widths = {round(bar.get_width(), 6) for bar in figure.axes[1].patches}
    assert {round(part.emphasis_share, 6) for part in report.parts} <= widths
    axes = Figure().subplots()
    assert report.plot(axes) is axes.figure
    assert len(axes.patches) > 0


def test_picture_of_nothing(tmp_path):
    target = torch.full((3,), -100)
    report = emphasis_report(dm_loss(torch.zeros(3, 4), target, DM, return_output=True), target)
    report.plot(tmp_path / "nothing.png")


def test_environment():
    lines = dict(line.split(": ", 1) for line in fused_dm.environment_report().splitlines())
    assert lines["fused_dm"] == fused_dm.__version__
    assert lines["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert lines["implementations"] == ", ".join(fused_dm.available_impls())
    assert {"python", "triton", "CPU threads", "GPU 0" if GPU else "GPU"} <= set(lines)


@pytest.mark.parametrize("where", [None, 3, True])
def test_what_is_no_place_for_a_picture(where):
    report = emphasis_report(output_of([0.1, 0.9], [1.0, 1.0]), torch.arange(2))
    with pytest.raises(TypeError, match=f"where: expected a path or matplotlib axes, got {where}"):
        report.plot(where)


def test_plot_refuses_a_folder(tmp_path):
    report = emphasis_report(output_of([0.1, 0.9], [1.0, 1.0]), torch.arange(2))
    with pytest.raises(ValueError, match="where: expected a file to write or matplotlib axes, got the folder"):
        report.plot(tmp_path)
    assert not list(tmp_path.iterdir())
