"""The heavy branch of the attention layers: attention to routed keys and values, and to a learned pair."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reference.layers.norms import RMSNorm
from reference.layers.operations import Operations, UseTriton
from reference.layers.rotary import Rotations, rotate


class Attention(nn.Module):
    """The heavy branch: dense attention of routed queries to routed keys and values, and to a learned pair of these."""

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
        operations = self.operations
        attend = operations.flash_routed_attention if self.use_flash else operations.routed_attention
        out = attend(query, key_value=key_value, weights=scores_kv, null_kv=self.null_kv, **options)
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
