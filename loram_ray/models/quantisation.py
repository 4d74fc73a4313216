"""How a model's linears are stored in fewer bits: what every part of the package knows of it.

Nothing here needs transformers or bitsandbytes; the arithmetic is in `nf4`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Quantisation:
    """A form of quantised weights, as bitsandbytes stores them.

    Attributes:
        name: bitsandbytes' name of the codes.
        bits: of a weight's code.
        block: weights that share a scale.
        block_of_scales: scales that share a scale of their own (double quantisation).
        compute: data type of products.
    """

    name: str
    bits: int = 4
    block: int = 64
    block_of_scales: int = 256
    compute: str = "bfloat16"

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the output of a quantisation in this form."""
        return {
            "type": self.name,
            "blocksize": self.block,
            "double": True,
            "compute": self.compute,
        }

    @property
    def description(self) -> str:
        """The form in words, for a model card."""
        return (
            f"{self.name.upper()} with double quantisation, blocks of {self.block}, products in "
            f"{self.compute}"
        )

    @property
    def tags(self) -> list[str]:
        """Tags of a model card on the hub."""
        return [self.name, "bitsandbytes"]

    def times_fewer(self, bits: int = 16) -> float:
        """How many times fewer bytes the codes alone take than weights of so many bits."""
        return bits / self.bits

    def state_of(self, weight: str) -> str:
        """Name of the stored tensor that describes a quantised weight."""
        return f"{weight}{_STATE}{self.name}"

    def stored_shapes(
        self, weight: str, shape: tuple[int, ...], double: bool
    ) -> dict[str, tuple[int, ...] | None]:
        """Shape of each stored tensor of a weight, by name; None is any.

        Args:
            weight: its name.
            shape: before quantisation.
            double: whether its scales are quantised, too.
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
"""The form that `quantize` writes and trainings read."""
READABLE = (NF4, Quantisation("fp4"))
"""Forms of models that are loaded."""
