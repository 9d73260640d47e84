"""The routed feed-forward layer."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reference._shared.arguments import check_counts, check_positive
from reference._shared.sizes import WIDEST_BIASED_GELU
from reference.layers.join import join
from reference.layers.linear import Rounded, is_plain, linear, round_weights
from reference.layers.norms import RMSNorm
from reference.layers.operations import Operations, UseTriton
from reference.layers.replayed import replayed
from reference.layers.router import CoordinateDescentRouter, RouterReturn
from reference.layers.start import Start, start
from reference.layers.together import Together, route_together


class ConditionalRoutedFeedForward(nn.Module):
    """A narrow feed-forward layer for all tokens, and a wide one for routed tokens (2303.09752, 3.2).

    Args:
        dim: size of a token.
        num_heavy_tokens: number of tokens that are routed through the wide layer.
        light_ff_mult, heavy_ff_mult: hidden size of each layer, as a multiple of dim.
        router_straight_through: weights of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of `CoordinateDescentRouter`.
        use_triton: as in `CoordinateDescentRouter`, for all operations that have kernels.
        init: `published`, or `zero`: the output of the wide layer starts at 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens: int,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        use_triton: UseTriton = False,
        init: Start = "published",
    ) -> None:
        super().__init__()
        check_counts(dim=dim, num_heavy_tokens=num_heavy_tokens)
        check_positive(light_ff_mult=light_ff_mult, heavy_ff_mult=heavy_ff_mult)
        self.num_heavy_tokens = num_heavy_tokens
        self.operations = Operations.of(use_triton)
        self.use_triton = self.operations.use_triton
        options = {"straight_through": router_straight_through, "use_triton": self.operations, **(router_kwargs or {})}
        self.router = CoordinateDescentRouter(dim, num_routing_tokens=1, **options)
        self.light_ff = _feed_forward(dim, light_ff_mult, self.operations)
        self.heavy_ff = _feed_forward(dim, heavy_ff_mult, self.operations)
        start(init, self.heavy_ff[-1])

    def extra_repr(self) -> str:
        return self.operations.path("combine")

    @replayed
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_tokens: int | None = None,
        routing_tokens: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d` to `b n d`.

        Args:
            mask: `b n`, False for tokens that are not routed.
            num_heavy_tokens: overrides that of the layer.
            routing_tokens: `b d`, overrides that of the router.
            residual: `b n d`, added to the result.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        return self.forward_rounded(
            round_weights(x, *self.rounding()),
            x,
            mask=mask,
            num_heavy_tokens=num_heavy_tokens,
            routing_tokens=routing_tokens,
            residual=residual,
        )

    def forward_rounded(
        self,
        rounded: Rounded,
        x: Tensor,
        *,
        mask: Tensor | None,
        num_heavy_tokens: int | None,
        routing_tokens: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """The forward pass with weights that are rounded already, as those of a block are."""
        num_heavy_tokens = self.num_heavy_tokens if num_heavy_tokens is None else num_heavy_tokens
        check_counts(num_heavy_tokens=num_heavy_tokens)
        together = self._route_together(x, num_heavy_tokens, mask, routing_tokens)
        if together is None:
            routed = self.router(x, num_tokens=num_heavy_tokens, mask=mask, routing_tokens=routing_tokens)
            light, bias = self._run(self.light_ff, x, rounded)
        else:
            scores, tokens = together.scores.squeeze(0), together.tokens.squeeze(0)
            routed = RouterReturn(together.indices.squeeze(0), scores, tokens, None)
            light, bias = self._run(self.light_ff, together.normalized, rounded, normalized=True)
            # The same tokens, from the operation that computes their whole gradient.
            residual = together.x if residual is x else residual
        heavy, routed_bias = self._run(self.heavy_ff, routed.routed_tokens, rounded)
        branches: dict[str, Any] = {"light": light, "residual": residual, "bias": bias, "routed_bias": routed_bias}
        return join(self.operations.combine, heavy, routed.scores, routed.indices, x, **branches)

    def rounding(self) -> list[nn.Module]:
        """Layers whose weights may be rounded together."""
        return [*self.light_ff.children(), *self.heavy_ff.children()]

    def _route_together(
        self, x: Tensor, num_tokens: int, mask: Tensor | None, routing_tokens: Tensor | None
    ) -> Together | None:
        """Tokens of the narrow layer, and those that are routed. None if a hook or a replaced module has to see the
        calls."""
        if not is_plain(self.light_ff, nn.Sequential):
            return None
        return route_together(x, self.light_ff[0], (self.router,), (num_tokens,), mask, (routing_tokens,))

    def _run(
        self, layers: nn.Sequential, x: Tensor, rounded: Rounded, normalized: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The result of the layers for x, which may be normalized already. The bias of the last layer may be left out;
        then it is the second result."""
        if not normalized and (not rounded or not is_plain(layers, nn.Sequential)):
            return layers(x), None
        *inner, last = islice(layers, int(normalized), len(layers))
        if self.operations.are_fused_for(x) and _end_with_biased_gelu(inner, rounded):
            *inner, widening, _ = inner
            x = F.linear(_through(inner, x, rounded), rounded[widening][0])
            x = self.operations.biased_gelu(x, widening._parameters["bias"])
        else:
            x = _through(inner, x, rounded)
        if last in rounded:
            return F.linear(x, rounded[last][0]), last._parameters["bias"]
        return linear(last, x, rounded), None


def _feed_forward(dim: int, mult: float, operations: Operations) -> nn.Sequential:
    hidden = int(dim * mult)
    return nn.Sequential(RMSNorm(dim, operations), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def _through(layers: Sequence[nn.Module], x: Tensor, rounded: Rounded) -> Tensor:
    for layer in layers:
        x = linear(layer, x, rounded)
    return x


def _end_with_biased_gelu(layers: Sequence[nn.Module], rounded: Rounded) -> bool:
    """True if `biased_gelu` has kernels for the last two layers, and no observer needs to see their calls."""
    if len(layers) < 2 or not is_plain(layers[-1], nn.GELU) or layers[-1].approximate != "none":
        return False
    bias = layers[-2]._parameters["bias"] if layers[-2] in rounded else None
    # For wider rows the operation is PyTorch's in fp32, which takes longer than a product with bias and a GELU.
    return bias is not None and len(bias) <= WIDEST_BIASED_GELU
