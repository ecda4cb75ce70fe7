"""How each kernel is launched, from the sizes and the device: every such choice is made here.

kernels/README.md has the counts behind the numbers.
"""

from typing import NamedTuple

# The most classes of a row that is one block, and the elements of a block of a longer one.
TILE = 4096
# Elements of several rows that are loaded one at a time: a thread has an element of every row, and with each the row's numbers.
NARROW_TILE = 1024
# Threads of a program at most, on any GPU.
MOST_THREADS = 1024
# Programs of 8 warps that a multiprocessor holds, and rounds of programs that a split or cut launch fills it with.
RESIDENT = 8
# Elements of the rows of a program of the forward kernel, which does the arithmetic of those rows at once.
ROW_ELEMENTS = 32768
# One program alone saves a launch, about 2 us, and takes a memory round trip and two reductions, about 1 us, for each tile.
TILES_ALONE = 4
# Rows of more classes that begin anywhere are read 16 bytes at a time, but for their edges.
SHIFTED = 16
# From this architecture of NVIDIA's on a kernel's registers are left to the compiler: it would spill some.
ARCH_UNLIMITED = 100
# Bytes of a block of a long row's gradient, for 16 warps.
GRADIENT_BLOCKS = (32768, 16384)
# Rows of a program that computes what each received: one a thread, of 8 warps.
RECEIVED = 256
# Rows whose weights one program adds: it reads 512 KiB of labels in about the 5 us that torch's launches take.
ROWS_ALONE = 65536
# Bytes that an H100 moves while it starts one more launch.
LAUNCH_BYTES = 6 << 20


class Device(NamedTuple):
    """What a launch depends on."""

    multiprocessors: int
    l2_bytes: int  # 0 where it is not known
    warp: int = 32  # threads
    least: int = 0  # elements of a tile of whole rows, where that is more than what is best on a GPU
    limits: bool = False  # its compiler may be told how many registers a thread has at most
    fewer: int = 1  # blocks of a row that stay in registers, less than on an H100: other compilers need more beside them


H100 = Device(132, 50 << 20, limits=True, fewer=0)
MI300X = Device(304, 4 << 20, warp=64)
# The interpreter stands in for one, with tiles as large as they may be: its time goes by programs.
INTERPRETER = H100._replace(least=TILE)


class Sizes(NamedTuple):
    """Sizes of the logits: images x positions rows."""

    images: int
    positions: int
    classes: int
    itemsize: int
    spatial: bool = False  # the classes are not adjacent in memory; where anything is, it is the positions
    aligned: bool = True  # the adjacent dimension is read 16 bytes at a time
    shift: int = 0  # elements by which rows may begin after a multiple of 16 bytes

    @property
    def columns(self) -> int:
        """Elements of a row from the 16 bytes in which it begins."""
        return self.classes + self.shift

    @property
    def rows(self) -> int:
        return self.images * self.positions

    @property
    def bytes(self) -> int:
        return self.rows * self.classes * self.itemsize


class Launch(NamedTuple):
    """How to launch a kernel.

    `way` is "tiles" (a program owns rows), "alone" (one program owns the batch), "split" (a program owns a span of the
    classes of rows, and what several find of a row is combined by one more launch) or "spans" (likewise, nothing to combine).
    """

    way: str
    block_n: int  # rows of a tile
    block_v: int  # classes of a block
    num_warps: int
    span: int  # classes that a program covers: a multiple of block_v, at least V but for "split" and "spans"
    stream: bool = False  # what is read or written is not wanted again: it leaves the L2 cache first
    lanes: int = 1  # parts of a row's statistics that are kept apart until its last block; 1 for a row in one
    stages: int = 1  # blocks on their way at a time
    registers: int = 0  # of a thread at most, so that as many programs fit as were measured; 0 for as many as it takes
    repeat: int = 1  # tiles that a program of the forward kernel owns, one after another
    kept: int = 0  # blocks of a row that the fused kernel keeps in registers, where it has several

    def tiles(self, sizes: Sizes) -> int:
        """Tiles of rows; none crosses from one image to the next."""
        return sizes.images * _cdiv(sizes.positions, self.block_n)

    def programs(self, sizes: Sizes) -> int:
        """Programs for all tiles."""
        return _cdiv(self.tiles(sizes), self.repeat)

    def spans(self, sizes: Sizes) -> int:
        """Programs that share a row."""
        return _cdiv(sizes.columns, self.span)


class InBlocks(NamedTuple):
    """How the fused kernel takes rows of several blocks on an H100."""

    columns: int  # at most
    block_v: int
    num_warps: int
    kept: int
    resident: int  # programs of a multiprocessor, which share its registers; 0 for what comes of those that they take


# By the bytes of a logit, the shortest rows first.
IN_BLOCKS = {
    2: (InBlocks(32768, 4096, 8, 8, 2), InBlocks(65536, 4096, 8, 7, 2), InBlocks(1 << 62, 16384, 32, 2, 1)),
    4: (InBlocks(65536, 4096, 16, 2, 2), InBlocks(1 << 62, 8192, 16, 3, 1)),
    8: (InBlocks(1 << 62, 4096, 8, 1, 0),),
}
# Under a softcap, whose slope is as much again.
CAPPED_IN_BLOCKS = InBlocks(1 << 62, 2048, 8, 1, 0)
# Registers of a multiprocessor of NVIDIA's, and of one of its threads at most.
REGISTERS = 65536
THREAD_REGISTERS = 255


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def shifted(classes: int) -> bool:
    """Whether to read rows that begin anywhere 16 bytes at a time."""
    return classes > SHIFTED


def _rows(sizes: Sizes, device: Device, elements: int, per_warp: int) -> Launch:
    """Several rows whole, of so many elements together; at least one."""
    width = _power_of_2(max(16, sizes.columns))
    elements = max(elements, device.least)
    if sizes.itemsize == 8:
        elements, per_warp = elements // 2, per_warp // 2
    if not sizes.aligned:
        elements, per_warp = min(elements, NARROW_TILE), min(per_warp, NARROW_TILE // 4)
    block_n = max(1, min(128, elements // width))
    return Launch("tiles", block_n, width, max(1, min(8, block_n * width // per_warp)), width)


def _blocks(sizes: Sizes, device: Device, block_v: int, num_warps: int, stages: int = 1) -> Launch:
    """One row in blocks. A number for each thread, so that its threads meet once, not at every block."""
    span = _cdiv(sizes.columns, block_v) * block_v
    lanes = device.warp * num_warps if span > block_v else 1
    return Launch("tiles", 1, block_v, num_warps, span, lanes=lanes, stages=stages if span > block_v else 1)


def in_blocks(sizes: Sizes, device: Device, choice: InBlocks) -> Launch:
    """One row in blocks, of which some stay in registers."""
    # A thread has 16 bytes of a block at least.
    most = min(MOST_THREADS, choice.block_v * sizes.itemsize // 16) // device.warp
    launch = _blocks(sizes, device, choice.block_v, min(choice.num_warps, most))
    registers = REGISTERS // max(1, 32 * choice.num_warps * choice.resident) // 8 * 8
    capped = device.limits and choice.resident and registers < THREAD_REGISTERS
    # The edges of a row that begins anywhere take registers too.
    fewer = device.fewer + (sizes.shift > 0)
    kept = min(max(1, choice.kept - fewer), launch.span // choice.block_v)
    return launch._replace(kept=kept, registers=registers if capped else 0)


def _spatial(sizes: Sizes) -> Launch:
    """Where the positions are the adjacent dimension, 128 of them make the segments that a warp reads whole."""
    block_n = min(128, _power_of_2(max(16, sizes.positions)))
    block_v = min(_power_of_2(max(16, sizes.columns)), TILE // block_n)
    return Launch("tiles", block_n, block_v, 8, _cdiv(sizes.columns, block_v) * block_v)


def _cut(way: str, launch: Launch, sizes: Sizes, programs: int) -> Launch:
    """Rows cut along the classes into as many spans as it takes for that many programs."""
    blocks = _cdiv(sizes.columns, launch.block_v)
    spans = _cdiv(programs, max(1, launch.tiles(sizes)))
    return launch._replace(way=way, span=_cdiv(blocks, min(spans, blocks)) * launch.block_v)


def forward(sizes: Sizes, device: Device, capped: bool = False) -> Launch:
    """Of the launch that reads the logits once: alone, tiles or split."""
    if sizes.spatial:
        launch = _spatial(sizes)
    elif sizes.columns <= TILE:
        launch = _rows(sizes, device, TILE, TILE // 8)
    else:
        launch = _blocks(sizes, device, TILE, 8)
    if launch.tiles(sizes) * _cdiv(sizes.columns, launch.block_v) <= TILES_ALONE:
        # A program that has the device for itself gains by more warps, and leaves nobody without.
        return launch._replace(way="alone", num_warps=8)
    launch = margin(sizes, device, capped)
    if launch.way == "split" or sizes.spatial:
        return launch
    # The arithmetic of a row waits for that of others, as far as that leaves two programs for every place.
    repeat = launch.tiles(sizes) // (2 * RESIDENT * device.multiprocessors)
    repeat = min(repeat, ROW_ELEMENTS // (launch.block_n * launch.span), 128 // launch.block_n)
    return launch._replace(repeat=1 << max(0, repeat.bit_length() - 1))


def tiles(sizes: Sizes, device: Device) -> Launch:
    """Of a pass over whole rows that leaves numbers of them."""
    if sizes.spatial:
        return _spatial(sizes)
    if sizes.columns <= TILE:
        return _rows(sizes, device, 2048 if sizes.columns <= 512 else 1024, 1024)
    if not sizes.aligned:
        return _blocks(sizes, device, 2048, 4)
    few = sizes.rows < device.multiprocessors
    return _blocks(sizes, device, TILE, 4 if few or sizes.columns <= 65536 else 8)


def margin(sizes: Sizes, device: Device, capped: bool = False) -> Launch:
    """Of the margin's forward, which has no sum over the batch: tiles or split."""
    launch = tiles(sizes, device)
    if launch.tiles(sizes) >= device.multiprocessors or sizes.columns <= launch.block_v:
        return launch
    if device.limits and not (capped or sizes.spatial or sizes.itemsize == 8):
        # As many programs of 4 warps as the spans are made for. Triton 3.6 takes no more by itself, 3.7 would.
        launch = launch._replace(registers=64)
    return _cut("split", launch, sizes, RESIDENT * device.multiprocessors)


def fused(sizes: Sizes, device: Device, capped: bool = False) -> Launch:
    """Of the single fused kernel: tiles; or split, for its work in three launches.

    What of a row the registers do not keep, the second read should find in L2: so few rows are in flight.
    """
    if sizes.spatial:
        launch = _spatial(sizes)
    elif sizes.columns <= TILE:
        launch = _rows(sizes, device, 2048 if sizes.columns <= 512 else 1024, 512 if sizes.columns <= 1024 else 1024)
    elif not sizes.aligned:
        launch = _blocks(sizes, device, 2048, 4)
    elif sizes.columns <= 2 * TILE and sizes.itemsize < 8:
        launch = _blocks(sizes, device, 2 * TILE, 8 if capped or sizes.itemsize == 2 else 16)
    else:
        choices = (CAPPED_IN_BLOCKS,) if capped else IN_BLOCKS[sizes.itemsize]
        launch = in_blocks(sizes, device, next(choice for choice in choices if sizes.columns <= choice.columns))
    programs = launch.tiles(sizes)
    if 0 < programs < device.multiprocessors and sizes.columns > TILE:
        # Bytes from memory: of a fused kernel that leaves multiprocessors idle, and of a pass more that leaves none.
        one = 2 * sizes.bytes * device.multiprocessors // programs
        three = (2 if sizes.bytes <= device.l2_bytes // 2 else 3) * sizes.bytes + LAUNCH_BYTES
        if three < one:
            return margin(sizes, device, capped)
    return launch


def gradient(sizes: Sizes, device: Device, whole_rows: bool = False) -> Launch:
    """Of a launch that reduces nothing, and so may cut rows where there are too few to fill a device: spans.

    `whole_rows` is for launches that are expected to return at once, and so want few programs, which are small.
    """
    if sizes.spatial:
        launch = _spatial(sizes)
    elif sizes.columns <= 2048:
        launch = _rows(sizes, device, 1024, 1024)
    elif sizes.aligned and whole_rows:
        launch = _blocks(sizes, device, 1024, 1)
    elif sizes.aligned:
        # Through shared memory, three blocks on their way: so long rows have three at least.
        wide = (block // sizes.itemsize for block in GRADIENT_BLOCKS)
        block_v = next((block for block in wide if sizes.columns > 3 * block), 0)
        launch = _blocks(sizes, device, block_v or 2048, 16 if block_v else 4, stages=3)
    else:
        launch = _blocks(sizes, device, TILE, 4, stages=2)
    programs = 1 if whole_rows else 2 * RESIDENT * device.multiprocessors
    return _cut("spans", launch, sizes, programs)._replace(stream=sizes.bytes > device.l2_bytes)


def combining(sizes: Sizes, parts: int) -> Launch:
    """Of the launch that combines `parts` statistics of each row."""
    width = _power_of_2(parts)
    block_n = max(1, min(128, TILE // width, _power_of_2(sizes.positions)))
    return Launch("tiles", block_n, width, 4, width)


def totals(programs: int) -> dict[str, int | bool]:
    """Of the launch that adds the sums of so many programs: all loaded at once, up to 16 a thread."""
    block = min(8192, _power_of_2(max(128, programs)))
    return {"BLOCK": block, "ONE_BLOCK": programs <= block, "num_warps": max(4, min(16, block // 256))}


def divisor(rows: int) -> dict[str, int]:
    """Of the launch that adds the weights of so many rows, up to 16 a thread at once."""
    block = min(8192, _power_of_2(max(128, rows)))
    return {"BLOCK": block, "num_warps": max(4, min(16, block // 256))}
