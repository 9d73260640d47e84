"""The heavy branch of the attention layers: attention to routed keys and values, and to a learned pair."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reference._arguments import check_routed
from reference._attention import RMSNorm, Rotations, attend, rotate
from reference._operations import choose, path


def routed_attention(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """Softmax attention of routed queries to routed keys and values, and to a learned pair (2303.09752, 3.2).

    Each route serves its share of the heads.

    Args:
        query: `b i (h d)`, any float dtype.
        key_value: `b r j (h kv d)`, in the dtype of the queries: of each token and route, for the heads of the route, a
            key and a value side by side.
        weights: `b r j`, multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`: a key and a value that every query attends to, too.
        mask: `b r j`, bool; False for tokens that are not attended to.

    Returns:
        `b i (h d)`, in the dtype of the queries.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return attend_to_routed(
        query, key_value, weights, null_kv, mask=mask, multiply_keys_by_score=multiply_keys_by_score
    )


def attend_to_routed(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
    use_flash: bool = False,
) -> Tensor:
    """`routed_attention`; with `use_flash` by PyTorch's scaled_dot_product_attention."""
    check_routed(query, key_value, weights, null_kv, mask)
    (batch, routes), heads = key_value.shape[:2], null_kv.shape[1]
    query = rearrange(query, "b i (h d) -> b h i d", h=heads)
    key, value = rearrange(key_value, "b r j (h kv d) -> kv b r h j d", kv=2, h=heads // routes)
    weights = rearrange(weights, "b r j -> b r 1 j 1").to(value.dtype)
    value = value * weights
    if multiply_keys_by_score:
        key = key * weights
    null_key, null_value = repeat(null_kv, "kv h d -> kv b h 1 d", b=batch).to(key.dtype)
    key, value = (rearrange(each, "b r h j d -> b (r h) j d") for each in (key, value))
    key, value = torch.cat((null_key, key), dim=-2), torch.cat((null_value, value), dim=-2)
    if mask is not None:
        mask = repeat(F.pad(mask, (1, 0), value=True), "b r j -> b (r h) 1 j", h=heads // routes)
    out = attend(query, key, value, mask, use_flash=use_flash, has_some=True)
    return rearrange(out, "b h i d -> b i (h d)")


def _is_plain(linear: nn.Module) -> bool:
    """Whether nobody can tell the product with its weight from a call: a linear layer as PyTorch has it."""
    # Past `nn.Module.__getattr__`, which takes longer than all the rest.
    parameters = linear._parameters
    return (
        type(linear) is nn.Linear
        and parameters["bias"] is None
        and "forward" not in vars(linear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and not _has_any_global_hook()
        and not is_traceable_wrapper_subclass(parameters.get("weight"))
    )


class Attention(nn.Module):
    """The heavy branch: dense attention of routed queries to routed keys and values, and to a learned pair of these."""

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        multiply_keys_by_score: bool = False,
        use_flash: bool = False,
        use_triton: bool | None = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.multiply_keys_by_score = multiply_keys_by_score
        self.use_flash, self.use_triton = use_flash, use_triton
        self.norm = RMSNorm(dim, use_triton)
        self.null_kv = nn.Parameter(torch.randn(2, heads, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self._attend = choose("routed_attention", partial(attend_to_routed, use_flash=use_flash), use_triton)

    def extra_repr(self) -> str:
        plain = "scaled_dot_product_attention" if self.use_flash else "einsum"
        return f"{path('routed_attention', self.use_triton)}, plain: {plain}"

    def project(self, context: Tensor, routes: int) -> Tensor:
        """Keys and values `b r j (h kv d)` of tokens `b r j d`, or of `b 1 j d` for all routes."""
        context = self.norm(context)
        if context.shape[1] == 1:
            # One product for all routes, and no copy of the tokens for each.
            return rearrange(self.to_kv(context), "b 1 j (r hd) -> b r j hd", r=routes)
        if _is_plain(self.to_kv):
            return context @ rearrange(self.to_kv.weight, "(r hd) d -> r d hd", r=routes)
        # What adapts, quantises or watches the layer sees it called, and gives of each token what is for its route.
        of_all = rearrange(self.to_kv(context), "b r j (s hd) -> s b r j hd", s=routes)
        return torch.stack([of_all[route, :, route] for route in range(routes)], dim=1)

    def forward(
        self,
        x: Tensor,
        key_value: Tensor,
        scores_kv: Tensor,
        mask: Tensor | None = None,
        scores_q: Tensor | None = None,
        rotations: Rotations | None = None,
    ) -> Tensor:
        """Queries from tokens `b i d`, which attend in each route with its share of the heads.

        Args:
            key_value: `b r j (h kv d)`, as `project` makes them.
            scores_kv: `b r j`, multiplied with values, and with keys if `multiply_keys_by_score`.
            mask: `b r j`, False for keys that are not attended to.
            scores_q: `b i`, multiplied with queries.
        """
        query = self.to_q(self.norm(x))
        if scores_q is not None:
            query = query * scores_q.unsqueeze(-1).to(query.dtype)
        if rotations is not None:
            query, key_value = self._rotate(query, key_value, rotations)
        options = {"mask": mask, "multiply_keys_by_score": self.multiply_keys_by_score}
        out = self._attend(query, key_value=key_value, weights=scores_kv, null_kv=self.null_kv, **options)
        return self.to_out(out)

    def _rotate(self, query: Tensor, key_value: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor]:
        """Queries, and the keys beside values, at their positions."""
        query = rotate(rearrange(query, "b i (h d) -> b h i d", h=self.heads), rotations.query)
        dim_head = query.shape[-1]
        key, value = rearrange(key_value, "b r j (h kv d) -> kv b r h j d", kv=2, d=dim_head)
        key = rotate(key, rotations.key)
        return (
            rearrange(query, "b h i d -> b i (h d)"),
            rearrange(torch.stack((key, value)), "kv b r h j d -> b r j (h kv d)"),
        )
