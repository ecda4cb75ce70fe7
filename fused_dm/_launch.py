"""How each kernel is launched, from the sizes and the device: every such choice is made here.

kernels/README.md has the counts behind the numbers.
"""

from typing import NamedTuple

# Elements that a program of 4 warps holds without spilling, 32 a thread; and of several rows that are loaded one element at
# a time, where a thread has an element of every row and with each the numbers of that row.
TILE = 4096
NARROW_TILE = 1024
# Programs of the forward kernel that a multiprocessor holds, and rounds of programs that a split or cut launch fills it with.
RESIDENT = 8
# Elements of the rows of a program of the forward kernel.
ROW_ELEMENTS = 65536
# One program alone saves a launch, about 2 us, and takes a memory round trip and two reductions, about 1 us, for each tile.
TILES_ALONE = 4
# Bytes that an H100 moves while it starts one more launch.
LAUNCH_BYTES = 6 << 20


class Device(NamedTuple):
    """What a launch depends on."""

    multiprocessors: int
    l2_bytes: int  # 0 where it is not known


# The interpreter stands in for one.
H100 = Device(132, 50 << 20)


class Sizes(NamedTuple):
    """Sizes of the logits: images x positions rows."""

    images: int
    positions: int
    classes: int
    itemsize: int
    spatial: bool = False  # the classes are not adjacent in memory; where anything is, it is the positions
    aligned: bool = True  # the adjacent dimension is read 16 bytes at a time

    @property
    def rows(self) -> int:
        return self.images * self.positions

    @property
    def bytes(self) -> int:
        return self.rows * self.classes * self.itemsize


class Launch(NamedTuple):
    """How to launch a kernel.

    `way` is "tiles" (a program owns rows), "alone" (one program owns the batch), "split" (a program owns a span of the classes
    of rows, and what several find of a row is combined by one more launch) or "spans" (likewise, nothing to combine).
    """

    way: str
    block_n: int  # rows of a tile
    block_v: int  # classes of a block
    num_warps: int
    span: int  # classes that a program covers: a multiple of block_v, at least V but for "split" and "spans"
    stream: bool = False  # what is read or written is not wanted again: it leaves the L2 cache first
    lanes: int = 1  # parts of a row's statistics that are kept apart until its last block
    stages: int = 1  # blocks on their way at a time
    repeat: int = 1  # tiles that a program of the forward kernel owns, one after another

    def tiles(self, sizes: Sizes) -> int:
        """Tiles of rows; none crosses from one image to the next."""
        return sizes.images * _cdiv(sizes.positions, self.block_n)

    def programs(self, sizes: Sizes) -> int:
        """Programs for all tiles."""
        return _cdiv(self.tiles(sizes), self.repeat)

    def spans(self, sizes: Sizes) -> int:
        """Programs that share a row."""
        return _cdiv(sizes.classes, self.span)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _whole(way: str, sizes: Sizes, block_n: int, block_v: int, num_warps: int) -> Launch:
    # A number for each thread of a row in blocks, so that its threads meet once, not at every block.
    lanes = 32 * num_warps if block_n == 1 and sizes.classes > block_v else 1
    return Launch(way, block_n, block_v, num_warps, _cdiv(sizes.classes, block_v) * block_v, lanes=lanes)


def tiles(sizes: Sizes) -> Launch:
    """One block of TILE elements a step: several rows for few classes, one row in blocks for many.

    Where the positions are the adjacent dimension, 128 of them make the segments that a warp reads whole.
    """
    width = _power_of_2(max(16, sizes.classes))
    if sizes.spatial:
        block_n = min(128, _power_of_2(max(16, sizes.positions)))
        return _whole("tiles", sizes, block_n, min(width, TILE // block_n), 4)
    block_v = min(width, TILE)
    elements = NARROW_TILE if not sizes.aligned else TILE // 2 if sizes.itemsize == 8 else TILE
    return _whole("tiles", sizes, max(1, min(128, elements // block_v)), block_v, 8 if block_v >= 2048 else 4)


def _cut(way: str, sizes: Sizes, programs: int) -> Launch:
    """Rows cut along the classes into as many spans as it takes for that many programs."""
    launch = tiles(sizes)
    blocks = _cdiv(sizes.classes, launch.block_v)
    spans = _cdiv(programs, max(1, launch.tiles(sizes)))
    return launch._replace(way=way, span=_cdiv(blocks, min(spans, blocks)) * launch.block_v)


def forward(sizes: Sizes, device: Device) -> Launch:
    """Of the launch that reads the logits once: alone, tiles or split."""
    launch = tiles(sizes)
    blocks = _cdiv(sizes.classes, launch.block_v)
    if launch.tiles(sizes) * blocks <= TILES_ALONE:
        # A program that has the device for itself gains by more warps, and leaves nobody without.
        return launch._replace(way="alone", num_warps=8)
    launch = margin(sizes, device)
    if launch.way == "tiles":
        # The arithmetic of a row waits for that of others, as far as that leaves two programs to every place for one.
        most = launch.tiles(sizes) // (2 * RESIDENT * device.multiprocessors)
        repeat = min(most, ROW_ELEMENTS // (launch.block_n * launch.span), 128 // launch.block_n)
        return launch._replace(repeat=1 << max(0, repeat.bit_length() - 1))
    return launch


def margin(sizes: Sizes, device: Device) -> Launch:
    """Of the margin's forward, which has no sum over the batch: tiles or split."""
    launch = tiles(sizes)
    if launch.tiles(sizes) >= device.multiprocessors or sizes.classes <= launch.block_v:
        return launch
    return _cut("split", sizes, RESIDENT * device.multiprocessors)


def fused(sizes: Sizes, device: Device, capped: bool = False) -> Launch:
    """Of the single fused kernel, which keeps a block in registers: tiles; or split, for its work in three launches.

    A row of up to 64 KiB is read once; longer rows take wide programs, so that few rows are in flight and the second read finds
    them in L2. More in registers spills, and half as much with a softcap, whose slope is as much again; 8 warps have the
    registers for that.
    """
    launch = tiles(sizes)
    width = _power_of_2(sizes.classes)
    if not sizes.spatial and width > TILE:
        registers = 65536 // sizes.itemsize
        block_v = width if width <= registers else min(16384, registers)
        launch = _whole("tiles", sizes, 1, block_v, max(8, min(16, block_v * sizes.itemsize // 2048)))
        if capped:
            launch = _whole("tiles", sizes, 1, min(block_v, 2 * TILE), 8)
    programs = launch.tiles(sizes)
    if 0 < programs < device.multiprocessors and sizes.classes > TILE:
        # Bytes from memory: of a fused kernel that leaves multiprocessors idle, and of a pass more that leaves none.
        one = 2 * sizes.bytes * device.multiprocessors // programs
        three = (2 if sizes.bytes <= device.l2_bytes // 2 else 3) * sizes.bytes + LAUNCH_BYTES
        if three < one:
            return margin(sizes, device)
    return launch._replace(stream=sizes.classes > launch.block_v)


def gradient(sizes: Sizes, device: Device, whole_rows: bool = False) -> Launch:
    """Of a launch that reduces nothing, and so may cut rows where there are too few to fill a device: spans.

    `whole_rows` is for launches that are expected to return at once, and so want few programs.
    """
    launch = tiles(sizes)._replace(way="spans") if whole_rows else _cut("spans", sizes, 2 * RESIDENT * device.multiprocessors)
    return launch._replace(stream=sizes.bytes > device.l2_bytes)


def combining(sizes: Sizes, parts: int) -> Launch:
    """Of the launch that combines `parts` statistics of each row."""
    width = _power_of_2(parts)
    block_n = max(1, min(128, TILE // width, _power_of_2(sizes.positions)))
    return Launch("tiles", block_n, width, 4, width)


def totals(programs: int) -> dict[str, int | bool]:
    """Of the launch that adds the sums of so many programs: all loaded at once, up to 16 a thread."""
    block = min(4096, _power_of_2(max(128, programs)))
    return {"BLOCK": block, "ONE_BLOCK": programs <= block, "num_warps": max(4, min(8, block // 256))}
