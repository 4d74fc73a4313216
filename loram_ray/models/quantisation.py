"""Formats of quantised linears, defined once for the whole package.

Nothing here needs transformers or bitsandbytes; the arithmetic is in `nf4`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Quantisation:
    """A format of quantised weights, as bitsandbytes stores them.

    Attributes:
        name: bitsandbytes' name of the codes.
        bits: Bits per weight.
        block: Number of weights that share a scale.
        block_of_scales: Number of scales that share a second-level scale (double quantisation).
        compute: Data type of products.
    """

    name: str
    bits: int = 4
    block: int = 64
    block_of_scales: int = 256
    compute: str = "bfloat16"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that identify the output of quantisation in this format."""
        return {
            "type": self.name,
            "blocksize": self.block,
            "double": True,
            "compute": self.compute,
        }

    @property
    def description(self) -> str:
        """Description of the format for a model card."""
        return (
            f"{self.name.upper()} with double quantisation, blocks of {self.block}, products in "
            f"{self.compute}"
        )

    @property
    def tags(self) -> list[str]:
        """Tags of the model card on the hub."""
        return [self.name, "bitsandbytes"]

    def times_fewer(self, bits: int = 16) -> float:
        """Return the compression ratio, without scales, of weights of ``bits`` bits."""
        return bits / self.bits

    def state_of(self, weight: str) -> str:
        """Return the name of the stored tensor that describes a quantised weight."""
        return f"{weight}{_STATE}{self.name}"

    def stored_shapes(
        self, weight: str, shape: tuple[int, ...], double: bool
    ) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of each stored tensor of a weight, by name; None accepts any shape.

        Args:
            weight: Name of the weight.
            shape: Shape of the weight before quantisation.
            double: Whether its scales are quantised, too.
        """
        elements = math.prod(shape)
        blocks = -(-elements // self.block)
        shapes: dict[str, tuple[int, ...] | None] = {
            weight: (-(-elements * self.bits // 8), 1),
            f"{weight}.absmax": (blocks,),
            f"{weight}.quant_map": (2**self.bits,),
            self.state_of(weight): None,
        }
        if double:
            shapes[f"{weight}.nested_absmax"] = (-(-blocks // self.block_of_scales),)
            shapes[f"{weight}.nested_quant_map"] = (256,)
        return shapes


NF4 = Quantisation("nf4")
"""Format that `quantize` writes and training reads."""
READABLE = (NF4, Quantisation("fp4"))
"""Formats that can be loaded."""
