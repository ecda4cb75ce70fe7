"""Every kernel once at small odd shapes, for `compute-sanitizer python tests/memory_check.py` on a GPU.

torch's caching allocator would hide what lies beyond a tensor, so it is switched off. `--share 2/8` is the third of eight
parts that may run at once: most of the time goes into compiling.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402
from batches import make  # noqa: E402

from fused_dm import dm_loss, edf, linear_dm_loss, margin  # noqa: E402

# Rows x classes: several rows a program, aligned and not; a row in blocks; a row in registers; few rows split over programs.
SHAPES = [(1, 1), (7, 10), (65, 101), (33, 1000), (3, 4097), (140, 9001), (2, 32000), (3, 40000), (2, 300001)]
OPTIONS = [
    {},
    {"inplace": True},
    {"reduction": "mean"},
    {"reduction": "sum", "normalizer": 3.0, "inplace": True},
    {"reduction": "none"},
    {"softcap": 5.0, "reduction": "mean"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", help="which of how many parts, such as 2/8")
    share, shares = map(int, parser.parse_args().share.split("/"))
    ran = 0
    for (rows, classes), dtype in list(itertools.product(SHAPES, (torch.bfloat16, torch.float32)))[share::shares]:
        logits, target = make(rows, classes, dtype, ignored=0.2)
        logits, target = logits.cuda(), target.cuda()
        for options in OPTIONS:
            leaf = logits.clone().requires_grad_()
            loss = dm_loss(leaf * 1 if options.get("inplace") else leaf, target, edf.DM(beta=8, lambd=0.5), **options)
            (2 * loss.sum()).backward()
            ran += 1
        # Logits that begin at an odd element.
        odd = torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(rows, classes).requires_grad_()
        dm_loss(odd, target, edf.DM(beta=8, lambd=0.5), reduction="mean").backward()
        leaf = logits.clone().requires_grad_()
        margin(leaf, target).nansum().backward()
        image = logits.t().contiguous()[None].requires_grad_()
        dm_loss(image, target[None], edf.GCE(q=0.7)).backward()
        ran += 3
    features = torch.randn(130, 24, device="cuda", requires_grad=True)
    weight = torch.randn(1003, 24, device="cuda", requires_grad=True)
    target = torch.randint(1003, (130,), device="cuda")
    linear_dm_loss(features, weight, target, edf.DM(beta=8, lambd=0.5), max_logits_bytes=1 << 18).backward()
    torch.cuda.synchronize()
    print(f"{ran + 1} losses and gradients computed")


if __name__ == "__main__":
    main()
