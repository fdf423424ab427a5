"""How a linear layer is stored when a job quantises the model: facts of each layout, and where its code is.

``layout`` names a class of ``app/dryrun/build/quantizers/``: which layers it takes, the tensors that each becomes, and
the events of making them. How to add one: ``docs/add-a-quantizer.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple


class WeightColumn(NamedTuple):
    """A column of the layer table: bytes of a weight of so many elements in one layout, with its constants."""

    title: str
    bytes_of: Callable[[int], int]


def four_bit_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of a weight in bitsandbytes' 4 bits: packed, a code of 16 floats, and one float32 for 64 elements.

    ``double_quant`` stores those floats in 8 bits, in blocks of 256, with a code of 256 floats and an offset:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py#L884
    ``quantize_4bit``.
    Confirmed by ``tests/test_stored.py``, on a checkpoint that bitsandbytes writes.
    """
    blocks = -(-elements // 64)
    packed = (elements + 1) // 2 + 64
    if not double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // 256) + 1024 + 4


WEIGHT_COLUMNS: dict[str, WeightColumn] = {
    "nf4": WeightColumn("Weights as NF4", lambda elements: four_bit_bytes(elements, False)),
    "nf4_double_quant": WeightColumn("as NF4, double", lambda elements: four_bit_bytes(elements, True)),
}
"""By field of :class:`vramplan.memory.table.Layer`: what the layers would weigh in layouts that are worth a column."""


@dataclass(frozen=True)
class Quantizer:
    """One layout of quantised weights. ``layout`` is relative to ``dryrun.build.quantizers``."""

    layout: str
    library: str
    least_bytes: float
    """Bytes of one parameter at least: no model of more parameters than the limit by this fits."""
    column: str | None = None
    """Field of the layer table with the weights in this layout; None: the table shows the load dtype."""
    nested_column: str | None = None
    """The same with its constants quantised too (``double_quant``); None: it has none that could be."""
    measured_as: str | None = None
    """Key of :data:`vramplan.memory.fit.MEASURED`; None: it is measured with the job's method."""
    caveat: str | None = None
    """What of a step's memory depends on values that a plan does not have."""

    @property
    def nests(self) -> bool:
        """Whether ``double_quant`` changes anything."""
        return self.nested_column is not None

    def column_of(self, double_quant: bool) -> str | None:
        """Field of the layer table with the weights as a job stores them."""
        return self.nested_column if double_quant and self.nests else self.column


_FOUR_BIT = Quantizer(".bnb_4bit:FourBit", "bitsandbytes", 0.5, column="nf4", nested_column="nf4_double_quant")

QUANTIZERS: dict[str, Quantizer] = {
    "nf4": _FOUR_BIT,
    "fp4": _FOUR_BIT,
    "int8": Quantizer(
        ".bnb_int8:Int8",
        "bitsandbytes",
        1.0,
        measured_as="int8",
        caveat="LLM.int8 keeps a copy of every outlier column (values of 6 and more); how many there are depends on "
        "the weights and is taken to be none",
    ),
}
"""By ``quantization.type`` of a job. All of them are trained through adapters only."""

if TYPE_CHECKING:
    QuantizerName = str
else:
    QuantizerName = Literal[tuple(QUANTIZERS)]
