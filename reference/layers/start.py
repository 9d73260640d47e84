"""The start of a layer: as published, or with a heavy branch that adds nothing before training."""

from typing import Literal

from torch import Tensor, nn

from reference._shared.arguments import require

Start = Literal["published", "zero"]
"""`published`: parameters are drawn as by colt5-attention. `zero`: the heavy branch initially adds 0 to each token."""


def check_start(init: Start) -> None:
    """Check that it is one of the two."""
    require(init in ("published", "zero"), "init", init, "published or zero")


def start(init: Start, output: nn.Module, null: Tensor | None = None) -> None:
    """Initialise the output projection of a heavy branch, and the output of tokens that are not routed.

    They are zeroed after they were drawn, so that the same seed gives the same other parameters.
    """
    check_start(init)
    if init == "zero":
        for each in (*output.parameters(), *([] if null is None else [null])):
            nn.init.zeros_(each)
