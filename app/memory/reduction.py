"""The buffer in which a CUDA reduction that is split over blocks meets, as a function of integers alone."""

from __future__ import annotations

from functools import partial


def scratch(multiprocessors: int, unrolled: int, sum_bytes: int, kept: int, *lies: int) -> int:
    """Bytes of a reduction's buffer in global memory: ``setReduceConfig`` and ``ReduceConfig::global_memory_size``.

    ``lies`` are size and stride of each dimension (elements): those that are ``kept``, so many, then those that are
    reduced. A thread takes ``unrolled`` elements of a contiguous input at a time; ``sum_bytes`` is the size of what it
    adds up in. Restated from native/cuda/Reduce.cuh for one pass (less than 2^31
    elements). Measured on an H100, bf16, to the byte: 6304 rows of 1024 take 51904512, 6304 of 4096 take 138412032;
    4096 rows of 3072 take 100663296.
    """
    every = [*zip(lies[::2], lies[1::2])]
    stay = [(size, stride) for size, stride in every[:kept] if size > 1]
    gone = [(size, stride) for size, stride in every[kept:] if size > 1]
    inputs = outputs = 1
    for size, _ in stay:
        outputs *= size
    for size, _ in gone:
        inputs *= size
    if not gone or inputs * outputs >= 1 << 31:
        return 0
    inner_gone = min(stride for _, stride in gone)
    inner_kept = min((stride for _, stride in stay), default=None)
    along = inner_kept is None or inner_gone < inner_kept
    vector = 1
    if along:
        width, height = inputs, outputs
        if inner_gone == 1 and width > 128 and not stay:
            width //= unrolled
    else:
        width, height = outputs, inputs
        if inner_kept == 1:
            vector = 4
            fastest = next(n for n, (_, stride) in enumerate(stay) if stride == 1)
            others = [stride for n, (_, stride) in enumerate([*stay, *gone]) if n != fastest]
            for number in (stay[fastest][0], *others):
                while number % vector:
                    vector //= 2
            width //= vector
    threads = 512 // vector
    power = partial(_power_of_two, most=threads)
    block_x = min(power(width), 32)
    block_y = min(power(height), threads // block_x)
    block_x = min(power(width), threads // block_y)
    step_in = step_out = 1
    if along:
        step_in *= block_x
    else:
        step_out *= block_x
    values = -(-inputs // step_in)
    split_rows = values >= block_y * 16 or values >= 256
    if split_rows:
        step_in *= block_y
        values = -(-inputs // step_in)
    else:
        step_out *= block_y
    target = multiprocessors * (2048 // (block_x * block_y))
    grid = -(-(outputs // vector) // step_out)
    if not split_rows or values < 256 or grid > target:
        return 0
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    if blocks <= 1:
        return 0
    size = sum_bytes * outputs * blocks
    return size if along else size * block_x * vector


def _power_of_two(number: int, most: int) -> int:
    """The largest power of two up to ``number`` and ``most`` (``last_pow2``)."""
    return min(1 << (number.bit_length() - 1), most) if number else 1
