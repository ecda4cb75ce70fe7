"""What docs/training.md says of batches in pieces: two processes, and the Trainer of Hugging Face by its signature."""

import re
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fused_dm import dm_loss, edf

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
DM = edf.DM(beta=8, lambd=0.5)


def function_of_the_page(name):
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if f"def {name}(" in code)
    found = {}
    exec(compile(code, name, "exec"), found)
    return found[name]


def model_and_data():
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Linear(8, 20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    target = torch.randint(20, (24,), generator=generator)
    target[5] = -100
    return model, torch.randn(24, 8, generator=generator), target


def part_of(rank, world_size, store):
    """A process of two, with a part of the batch that is not half of it."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model, features, target = model_and_data()
    mine = slice(0, 9) if rank == 0 else slice(9, 24)
    parallel = DistributedDataParallel(model)
    shared_divisor = function_of_the_page("shared_divisor")
    with torch.no_grad():
        sum_weight = dm_loss(model(features[mine]), target[mine], DM, return_output=True).sum_weight
    for emphasis, part in ((DM, sum_weight), (edf.GCE(q=0.7), (target[mine] != -100).sum())):
        model.zero_grad()
        divisor = shared_divisor(part)
        loss = dm_loss(parallel(features[mine]), target[mine], emphasis, reduction="sum", normalizer=divisor)
        loss.backward()
        whole, features_of_all, target_of_all = model_and_data()
        reduction = "sum_weight" if emphasis is DM else "mean"
        together = dm_loss(whole(features_of_all), target_of_all, emphasis, reduction=reduction)
        together.backward()
        for ours, truth in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, truth.grad)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world_size, together.detach())
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_share_a_divisor(tmp_path):
    torch.multiprocessing.start_processes(part_of, args=(2, tmp_path / "store"), nprocs=2, start_method="spawn")


def test_a_batch_in_which_every_label_is_ignored():
    logits, target = torch.randn(4, 7, requires_grad=True), torch.full((4,), -100)
    divisor = function_of_the_page("shared_divisor")((target != -100).sum())
    loss = dm_loss(logits, target, DM, reduction="sum", normalizer=divisor)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_a_trainer_of_hugging_face():
    compute_loss = function_of_the_page("compute_loss")
    logits = torch.randn(4, 7, 11, requires_grad=True)
    labels = torch.randint(11, (4, 7))
    labels[1, 3:] = -100
    count = (labels[:, 1:] != -100).sum()
    gce = edf.GCE(q=0.7)
    whole = compute_loss(types.SimpleNamespace(logits=logits), labels)
    (truth,) = torch.autograd.grad(whole, logits)
    parts = [
        compute_loss(types.SimpleNamespace(logits=logits[rows]), labels[rows], num_items_in_batch=count)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], truth)
    p = F.softmax(logits[:, :-1].detach(), -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    rows = torch.where(labels[:, 1:] == -100, 0, gce.loss(p.log(), torch.log1p(-p)))
    torch.testing.assert_close(whole.detach(), rows.sum() / count)
