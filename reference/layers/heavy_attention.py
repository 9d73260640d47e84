"""The heavy branch of the attention layers: attention to routed keys and values, and to a learned pair."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from reference._shared.rotary import rotate
from reference.layers.linear import Rounded, is_plain, linear
from reference.layers.norms import RMSNorm
from reference.layers.operations import Operations, UseTriton
from reference.layers.rotary import Rotations


class Attention(nn.Module):
    """The heavy branch: dense attention of routed queries to routed keys and values, and to a learned pair."""

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        multiply_keys_by_score: bool = False,
        use_flash: bool = False,
        use_triton: UseTriton = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.multiply_keys_by_score = multiply_keys_by_score
        self.use_flash = use_flash
        self.operations = Operations.of(use_triton)
        self.norm = RMSNorm(dim, self.operations)
        self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def extra_repr(self) -> str:
        plain = "scaled_dot_product_attention" if self.use_flash else "einsum"
        return f"{self.operations.path('routed_attention')}, plain: {plain}"

    def project(self, context: Tensor, routes: int, rounded: Rounded, normalized: bool = False) -> Tensor:
        """Keys and values `b r j (h kv d)` of tokens `b r j d`, or of `b 1 j d` for all routes."""
        context = context if normalized else self.norm(context)
        if context.shape[1] == 1:
            # One product for all routes, without a copy of the tokens for each.
            return rearrange(linear(self.to_kv, context, rounded), "b 1 j (r hd) -> b r j hd", r=routes)
        if is_plain(self.to_kv, nn.Linear) and self.to_kv._parameters["bias"] is None:
            weight, _ = rounded.get(self.to_kv, (self.to_kv.weight, None))
            return context @ rearrange(weight, "(r hd) d -> r d hd", r=routes)
        # Each token takes the part of its route.
        of_all = rearrange(self.to_kv(context), "b r j (s hd) -> s b r j hd", s=routes)
        return torch.stack([of_all[route, :, route] for route in range(routes)], dim=1)

    def forward(
        self,
        x: Tensor,
        key_value: Tensor,
        scores_kv: Tensor,
        rounded: Rounded,
        mask: Tensor | None = None,
        scores_q: Tensor | None = None,
        rotations: Rotations | None = None,
        indices: Tensor | None = None,
        normalized: bool = False,
    ) -> Tensor:
        """Queries from tokens `b i d`, which attend in each route with its share of the heads: `b i d`.

        Queries may belong to windows, `b w i d`. Each window then attends to its own list of keys and values.

        Args:
            key_value: `b r j (h kv d)`, as from `project`.
            scores_kv: `b r j`, or `b w r s` with windows; multiplied with values, and with keys if
                `multiply_keys_by_score`.
            rounded: as from `round_weights`.
            mask: as scores_kv, False for masked keys.
            scores_q: as x without features, multiplied with queries.
            indices: `b w r s` with windows: the list of each window, as indices into j.
            normalized: True if x has been normalized.
        """
        query = linear(self.to_q, x if normalized else self.norm(x), rounded)
        if scores_q is not None:
            query = query * scores_q.unsqueeze(-1).to(query.dtype)
        if rotations is not None:
            key_value = self._rotate_keys(key_value, rotations.key)
        options = {
            "key_value": key_value,
            "weights": scores_kv,
            "null_kv": self.null_kv,
            "mask": mask,
            "multiply_keys_by_score": self.multiply_keys_by_score,
        }
        angles = None if rotations is None else rotations.query
        if indices is None:
            out = self._attend_to_routed(query, angles, options)
        else:
            out = self._attend_to_lists(query, angles, {**options, "indices": indices})
        return linear(self.to_out, out, rounded)

    def _attend_to_routed(self, query: Tensor, angles: Tensor | None, options: dict[str, Any]) -> Tensor:
        if angles is not None:
            query = rearrange(rotate(self._by_head(query), angles), "b h i d -> b i (h d)")
        operations = self.operations
        attend = operations.flash_routed_attention if self.use_flash else operations.routed_attention
        out: Tensor = attend(query, **options)
        return out

    def _attend_to_lists(self, query: Tensor, angles: Tensor | None, options: dict[str, Any]) -> Tensor:
        query = self._by_head(query)
        query = query if angles is None else rotate(query, angles)
        operations = self.operations
        attend = operations.flash_gathered_attention if self.use_flash else operations.gathered_attention
        return rearrange(attend(query, **options), "b w h i d -> b w i (h d)")

    def _by_head(self, query: Tensor) -> Tensor:
        return rearrange(query, "... i (h d) -> ... h i d", h=self.heads)

    def _rotate_keys(self, key_value: Tensor, angles: Tensor) -> Tensor:
        """Keys rotated to their positions; values stay."""
        key, value = rearrange(key_value, "b r j (h kv d) -> kv b r h j d", kv=2, d=self.null_kv.shape[-1])
        return rearrange(torch.stack((rotate(key, angles), value)), "kv b r h j d -> b r j (h kv d)")
