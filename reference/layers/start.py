"""The start of a layer: as published, or with a heavy branch that adds nothing until it is trained."""

from typing import Literal

from torch import Tensor, nn

from reference._shared.arguments import require

Start = Literal["published", "zero"]
"""`published`: as colt5-attention draws parameters. `zero`: what the heavy branch adds to a token is 0 at first."""


def check_start(init: Start) -> None:
    """It is one of the two."""
    require(init in ("published", "zero"), "init", init, "published or zero")


def start(init: Start, output: nn.Module, null: Tensor | None = None) -> None:
    """Start a heavy branch by its output projection, and by the output of tokens that are not routed.

    They are zeroed after they were drawn, so that all other parameters are the same from a seed.
    """
    check_start(init)
    if init == "zero":
        for each in (*output.parameters(), *([] if null is None else [null])):
            nn.init.zeros_(each)
