"""The buffer in which the blocks of a split CUDA reduction meet, as a function of integers alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Dimension = tuple[int, int]
"""Size and stride of a dimension, in elements."""

MAX_THREADS = 512
"""``max_reduce_threads``: of a block, before each of them takes a vector of outputs."""
MAX_RESIDENT_THREADS = 2048
"""``maxThreadsPerMultiProcessor`` of the cards that the planner knows kernels of."""


def scratch(multiprocessors: int, unrolled: int, sum_bytes: int, kept: int, *sizes_and_strides: int) -> int:
    """Bytes of a reduction's buffer in global memory (``ReduceConfig::global_memory_size``); 0: it is not split.

    ``sizes_and_strides`` are those of each dimension in turn, in elements: first the ``kept`` dimensions (so many),
    then the reduced ones. A thread reads ``unrolled`` elements of a contiguous input at a time. ``sum_bytes`` is the
    size of the type that is added up in.

    Source: ``setReduceConfig`` in https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Reduce.cuh
    Limitation: reductions that take several passes (2^31 elements and more) are taken to need no buffer.
    Confirmed: H100, bf16, to the byte: 6304 rows of 1024 take 51904512, 6304 of 4096 take 138412032, 4096 rows of 3072
    take 100663296 (``tests/test_restated.py``).
    """
    dims = [*zip(sizes_and_strides[::2], sizes_and_strides[1::2], strict=True)]
    outer, reduced = ([dim for dim in part if dim[0] > 1] for part in (dims[:kept], dims[kept:]))
    outputs, inputs = (prod(size for size, _ in part) for part in (outer, reduced))
    if not reduced or inputs * outputs >= 1 << 31:
        return 0
    fastest_reduced = min(stride for _, stride in reduced)
    fastest_outer = min((stride for _, stride in outer), default=None)
    along = fastest_outer is None or fastest_reduced < fastest_outer  # reduction_on_fastest_striding_dimension
    vector = 1 if along or fastest_outer != 1 else _output_vector(outer, reduced)
    width, height = (inputs, outputs) if along else (outputs // vector, inputs)
    if along and fastest_reduced == 1 and width > 128 and not outer:
        width //= unrolled
    block_x, block_y = _block_shape(width, height, MAX_THREADS // vector)
    blocks = _blocks_per_output(inputs, outputs // vector, block_x, block_y, along, multiprocessors)
    if blocks <= 1:
        return 0
    size = sum_bytes * outputs * blocks
    return size if along else size * block_x * vector


def _output_vector(outer: Sequence[Dimension], reduced: Sequence[Dimension]) -> int:
    """How many outputs a thread computes at a time (``get_output_vec_size``): 4, 2 or 1.

    That many must divide the size of the contiguous dimension and the strides of all others.
    """
    contiguous = next(n for n, (_, stride) in enumerate(outer) if stride == 1)
    others = [stride for n, (_, stride) in enumerate([*outer, *reduced]) if n != contiguous]
    return next(vector for vector in (4, 2, 1) if not any(n % vector for n in (outer[contiguous][0], *others)))


def _block_shape(width: int, height: int, threads: int) -> tuple[int, int]:
    """Threads of a block in x and y (``ReduceConfig::set_block_dimension``)."""
    width, height = (_last_power_of_two(n, threads) for n in (width, height))
    block_x = min(width, 32)
    block_y = min(height, threads // block_x)
    return min(width, threads // block_y), block_y


def _blocks_per_output(inputs: int, outputs: int, block_x: int, block_y: int, along: bool, multiprocessors: int) -> int:
    """Over how many blocks the inputs of an output are split (``ctas_per_output``); 1: over none.

    ``outputs`` counts vectors. ``along``: threads in x share the inputs of an output, else they have one each.
    """
    inputs_at_once, outputs_at_once = (block_x, 1) if along else (1, block_x)
    values = -(-inputs // inputs_at_once)  # of a thread
    if values < block_y * 16 and values < 256:  # threads in y have outputs of their own
        return 1
    values = -(-inputs // (inputs_at_once * block_y))
    target = multiprocessors * (MAX_RESIDENT_THREADS // (block_x * block_y))
    grid = -(-outputs // outputs_at_once)
    if values < 256 or grid > target:
        return 1
    return max(min(-(-target // grid), -(-values // 16)), -(-values // 256))


def _last_power_of_two(number: int, most: int) -> int:
    """The largest power of two up to ``number``, ``most`` at most (``last_pow2``); 1 for 0."""
    return min(1 << (number.bit_length() - 1), most) if number else 1
