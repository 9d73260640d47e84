"""The base of the routed attention layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference._shared.arguments import check_counts, require
from reference._shared.rotary import rotary_angles
from reference.layers.heavy_attention import Attention
from reference.layers.join import join
from reference.layers.linear import Rounded, round_weights
from reference.layers.operations import Operations, UseTriton
from reference.layers.rotary import THETA, Rotations, angles_at
from reference.layers.router import CoordinateDescentRouter, RouterReturn
from reference.layers.start import Start, start


class RoutedBranch(nn.Module):
    """Base of the routed attention layers. It has two routers, the dense attention between routed tokens, and an output
    for tokens that are not routed.

    Args:
        dim: size of a token.
        num_routed_kv: number of sets of keys and values, each with its routing token and its share of the heads.
        dim_head, heads: of the dense attention.
        router_straight_through: weights of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of both routers; `kv_router_kwargs`: only of the router for keys and values.
        multiply_keys_by_score, multiply_queries_by_score: multiply these by the weights, too; values always are.
        use_triton: as in `CoordinateDescentRouter`, for all operations that have kernels.
        use_null_q_tokens: tokens that are not routed get a learned output instead of 0.
        use_flash_attn: use PyTorch's scaled_dot_product_attention if no kernel is used.
        init: `published`, or `zero`: null token and output of the dense attention start at 0, so that a layer starts as
            its light branch alone. With `published` the null token, drawn from randn, is added to most tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_routed_kv: int,
        dim_head: int,
        heads: int,
        router_straight_through: bool,
        router_kwargs: Mapping[str, Any] | None,
        multiply_keys_by_score: bool,
        multiply_queries_by_score: bool,
        use_triton: UseTriton,
        use_null_q_tokens: bool,
        use_flash_attn: bool,
        init: Start,
        kv_router_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads, num_routed_kv=num_routed_kv)
        require(heads % num_routed_kv == 0, "heads", heads, "a multiple of the {} key/value routes", num_routed_kv)
        self.multiply_queries_by_score = multiply_queries_by_score
        self.operations = Operations.of(use_triton)
        self.use_triton = self.operations.use_triton
        options = {"straight_through": router_straight_through, "use_triton": self.operations, **(router_kwargs or {})}
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = CoordinateDescentRouter(dim, num_routing_tokens=1, **options)
        kv_options = {**options, **(kv_router_kwargs or {})}
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **kv_options)
        self.heavy_attn = Attention(dim, dim_head, heads, multiply_keys_by_score, use_flash_attn, self.operations)
        start(init, self.heavy_attn.to_out, self.null_q_token)

    def extra_repr(self) -> str:
        return self.operations.path("combine")

    def round_weights(self, x: Tensor, light: nn.Module | None = None) -> Rounded:
        """Weights of the dense attention and of a light branch, for tokens on the device of x."""
        return round_weights(x, *self.rounding(light))

    def rounding(self, light: nn.Module | None = None) -> list[nn.Module]:
        """Layers of the dense attention and of a light branch, whose weights may be rounded together."""
        return [*self.heavy_attn.children(), *([] if light is None else light.children())]

    def route_context(
        self, context: Tensor, num_tokens: int, mask: Tensor | None, routing_tokens: Tensor | None, rounded: Rounded
    ) -> RouterReturn:
        """Route a context `b m d` to keys and values, always with a dimension of routes."""
        routed = self.kv_router(
            context, num_tokens=num_tokens, mask=mask, routing_tokens=routing_tokens, keep_one_route_dim=True
        )
        key_value = self.heavy_attn.project(routed.routed_tokens, self.kv_router.num_routing_tokens, rounded)
        return routed._replace(routed_tokens=key_value)

    def rotations(
        self, q: RouterReturn, kv: RouterReturn, places: Tensor, of_context: Tensor | None = None
    ) -> Rotations:
        """Angles of routed queries and keys, from the places `n p` of tokens and of a separate context, if any."""
        tokens = q.routed_tokens
        dim_head, dtype = self.heavy_attn.null_kv.shape[-1], torch.promote_types(tokens.dtype, torch.float32)
        angles = rotary_angles(places, dim_head, THETA, dtype)
        of_keys = angles if of_context is None else rotary_angles(of_context, dim_head, THETA, dtype)
        return Rotations(angles_at(angles, q.indices), angles_at(of_keys, kv.indices))

    def attend_routed(
        self,
        x: Tensor,
        q: RouterReturn,
        kv: RouterReturn,
        rounded: Rounded,
        rotations: Rotations | None = None,
        light: Tensor | None = None,
        residual: Tensor | None = None,
        normalized: bool = False,
    ) -> Tensor:
        """The heavy branch for tokens `b n d`, from routed queries q and keys and values kv as from `route_context`.
        Tokens of q may be normalized. Light and residual, `b n d`, are added if they are given. The result is `b n d`;
        weights are as from `round_weights`."""
        out = self.heavy_attn(
            q.routed_tokens,
            key_value=kv.routed_tokens,
            scores_kv=kv.scores,
            rounded=rounded,
            mask=kv.routed_mask,
            scores_q=q.scores if self.multiply_queries_by_score else None,
            rotations=rotations,
            **({"normalized": True} if normalized else {}),
        )
        branches: dict[str, Any] = {"null": self.null_q_token, "light": light, "residual": residual}
        return join(self.operations.combine, out, q.scores, q.indices, x, **branches)
