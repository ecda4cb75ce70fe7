"""What of a kernel's traffic reaches memory: an LRU L2 cache fed with its order of accesses: `python -m bench.l2_simulation`.

No GPU is needed, and none is measured: the cache is a model. Programs start in order, as many at a time as the registers of
the multiprocessors hold, and take turns, a block each. They start together and so stay in step, the worst case: all have
their largest working set at once. A block is one entry, so that sets and lines play no part. Reads that are found cost
nothing; others, and every write, once, cost a passage to or from memory. `evict_last`, `evict_first` and plain accesses form
three classes: a new entry displaces the least recently used one of the lowest class that has any, and a hint changes its
entry's class.

Reported is traffic in T, one pass over the logits. Half the capacity stands for the worst that two partitions can do, each
of which may hold its own copy of what the other's multiprocessors read.
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from fused_dm import _launch
from fused_dm._launch import Device, Launch, Sizes

FIRST, PLAIN, LAST = 0, 1, 2
DEVICES = {"H100": _launch.H100, "A100": Device(108, 40 << 20, limits=True)}
CLASSES = (32000, 50304, 128256, 262144)
ITEMSIZE = 2


class Access(NamedTuple):
    """A block that a program reads or writes."""

    block: tuple[int, int, int]  # tensor, row, number in the row
    write: bool
    rank: int


class Cache:
    """LRU in three classes, counted in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.traffic = capacity, 0, 0
        self.ranks: list[OrderedDict[tuple[int, int, int], int]] = [OrderedDict(), OrderedDict(), OrderedDict()]

    def touch(self, access: Access, size: int) -> None:
        found = False
        for entries in self.ranks:
            if access.block in entries:
                self.used -= entries.pop(access.block)
                found = True
        if access.write or not found:
            # A written block goes to memory once, now or when it is displaced.
            self.traffic += size
        while self.used + size > self.capacity:
            entries = next(entries for entries in self.ranks if entries)
            self.used -= entries.popitem(last=False)[1]
        self.ranks[access.rank][access.block] = size
        self.used += size


def fused_program(row: int, blocks: int, kept: int, hints: bool, backwards: bool) -> Iterator[Access]:
    """One row: read forwards; the first blocks stay in registers, the others are read again."""
    keep, drop = (LAST, FIRST) if hints else (PLAIN, PLAIN)
    for block in range(blocks):
        yield Access((0, row, block), False, keep if block >= kept else drop)
    for block in range(kept):
        yield Access((1, row, block), True, drop)
    for block in range(blocks - 1, kept - 1, -1) if backwards else range(kept, blocks):
        yield Access((0, row, block), False, drop)
        yield Access((1, row, block), True, drop)


def forward_program(row: int, blocks: int) -> Iterator[Access]:
    for block in range(blocks):
        yield Access((0, row, block), False, PLAIN)


def gradient_program(row: int, blocks: int, stream: bool) -> Iterator[Access]:
    drop = FIRST if stream else PLAIN
    for block in range(blocks):
        yield Access((0, row, block), False, drop)
        yield Access((1, row, block), True, drop)


def run(cache: Cache, programs: Iterator[Iterator[Access]], places: int, size: int) -> None:
    """Resident programs take turns, a block each; one that ends gives its place to the next."""
    running: list[Iterator[Access]] = []
    while True:
        while len(running) < places and (program := next(programs, None)) is not None:
            running.append(program)
        if not running:
            return
        going = []
        for program in running:
            access = next(program, None)
            if access is not None:
                cache.touch(access, size)
                going.append(program)
        running = going


def known_divisor(
    device: Device,
    classes: int,
    rows: int,
    hints: bool = True,
    backwards: bool = True,
    kept: int | None = None,
    crowd: float = 1,
    share: float = 1,
) -> float:
    """Traffic of the single fused kernel in T, with `crowd` times as many programs as are chosen."""
    launch = _launch.fused(Sizes(1, 8192, classes, ITEMSIZE), device)
    blocks = -(-classes // launch.block_v)
    size = launch.block_v * ITEMSIZE
    cache = Cache(int(device.l2_bytes * share))
    kept = launch.kept if kept is None else kept
    programs = (fused_program(row, blocks, kept, hints, backwards) for row in range(rows))
    run(cache, programs, min(rows, int(crowd * resident(launch) * device.multiprocessors)), size)
    return cache.traffic / (rows * blocks * size)


def resident(launch: Launch) -> int:
    """Programs on a multiprocessor: as many as have registers."""
    registers = launch.registers or _launch.REGISTERS // (32 * launch.num_warps)
    return max(1, _launch.REGISTERS // (32 * launch.num_warps * registers))


def sum_weight(device: Device, classes: int, rows: int, backwards: bool = True, stream: bool = True, share: float = 1) -> float:
    """Traffic of the forward and the gradient kernel in T."""
    launch = _launch.forward(Sizes(1, 8192, classes, ITEMSIZE), device)
    blocks = -(-classes // launch.block_v)
    size = launch.block_v * ITEMSIZE
    cache = Cache(int(device.l2_bytes * share))
    programs = _launch.RESIDENT * device.multiprocessors
    run(cache, (forward_program(row, blocks) for row in range(rows)), programs, size)
    order = range(rows - 1, -1, -1) if backwards else range(rows)
    run(cache, (gradient_program(row, blocks, stream) for row in order), programs, size)
    return cache.traffic / (rows * blocks * size)


def tables(rows: int) -> Iterator[str]:
    yield f"Traffic in T (N V itemsize bytes), {rows} rows of bf16; simulated, see `bench/l2_simulation.py`."
    yield ""
    yield "## Known divisor: the single fused kernel"
    yield ""
    heads = ["device", "V", "row", "rows in flight", "in registers", "forwards, no hints", "backwards, no hints"]
    heads += ["**backwards, hints**", "nothing in registers", "half the L2", "twice the programs"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, device in DEVICES.items():
        for classes in CLASSES:
            row = classes * ITEMSIZE
            launch = _launch.fused(Sizes(1, 8192, classes, ITEMSIZE), device)
            cells = [
                known_divisor(device, classes, rows, hints=False, backwards=False),
                known_divisor(device, classes, rows, hints=False),
                known_divisor(device, classes, rows),
                known_divisor(device, classes, rows, kept=0),
                known_divisor(device, classes, rows, share=0.5),
                known_divisor(device, classes, rows, crowd=2),
            ]
            flight = row * resident(launch) * device.multiprocessors / 2**20
            text = [f"{cell:.2f}" for cell in cells]
            text[2] = f"**{text[2]}**"
            kept = f"{min(1, launch.kept * launch.block_v / classes):.0%}"
            yield f"| {name} | {classes} | {row / 1024:.0f} KiB | {flight:.1f} MiB | {kept} | {' | '.join(text)} |"
    yield ""
    yield "## `sum_weight`: forward and gradient"
    yield ""
    yield "| device | V | rows in order | backwards | **backwards, streaming** | half the L2 | logits |"
    yield "|---|---|---|---|---|---|---|"
    for name, device in DEVICES.items():
        for classes in CLASSES:
            cells = [
                sum_weight(device, classes, rows, backwards=False, stream=False),
                sum_weight(device, classes, rows, stream=False),
                sum_weight(device, classes, rows),
                sum_weight(device, classes, rows, share=0.5),
            ]
            text = [f"{cell:.2f}" for cell in cells]
            text[2] = f"**{text[2]}**"
            yield f"| {name} | {classes} | {' | '.join(text)} | {rows * classes * ITEMSIZE / 2**20:.0f} MiB |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    text = "\n".join(tables(arguments.rows)) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(f"`python -m bench.l2_simulation --rows {arguments.rows}`\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
