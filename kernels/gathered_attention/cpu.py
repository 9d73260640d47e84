"""`kernels.gathered_attention` in PyTorch, window by window, for CPU tensors and fp64."""

import torch
from einops import einsum, rearrange
from torch import Tensor

from reference._shared.autocast import without_autocast


class _Window:
    """Queries, keys and values of a window in fp32 or fp64, and the softmax over its list; logits are natural."""

    def __init__(
        self,
        window: int,
        query: Tensor,
        key_value: Tensor,
        lists: Tensor,
        weights: Tensor,
        null_kv: Tensor,
        multiply_keys: bool,
    ) -> None:
        wide = torch.promote_types(query.dtype, torch.float32)
        (batch, _, heads, _, dim), routes = query.shape, key_value.shape[1]
        self.share = heads // routes
        tokens = lists[:, window]
        sequences = torch.arange(batch * routes, device=query.device).view(batch, routes, 1)
        self.rows = (sequences * key_value.shape[2] + tokens.clamp(min=0)).flatten()
        """Rows of the tokens `b r s` among `(b r n)`."""

        gathered = key_value.flatten(0, 2)[self.rows].to(wide)
        gathered = rearrange(gathered, "(b r s) (h kv d) -> kv b (r h) s d", b=batch, r=routes, kv=2, d=dim)
        self.key, self.value = gathered
        self.weights = self._by_head(weights[:, window].to(wide))
        self.null_key, self.null_value = null_kv.to(query.dtype).to(wide)
        self.scale = dim**-0.5
        self.query = query[:, window].to(wide) * self.scale
        self.products = einsum(self.query, self.key, "b h i d, b h s d -> b h i s")
        self.logits = self.products * self.weights if multiply_keys else self.products
        self.logits = self.logits.masked_fill(self._by_head(tokens < 0), -torch.inf)
        self.null_logits = einsum(self.query, self.null_key, "b h i d, h d -> b h i")

    def _by_head(self, listed: Tensor) -> Tensor:
        """`b r s` as `b h 1 s`."""
        return listed.repeat_interleave(self.share, dim=1).unsqueeze(2)


def forward(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
) -> None:
    lists.copy_(indices if mask is None else torch.where(mask, indices, -1))
    with without_autocast(query):
        for window in range(query.shape[1]):
            at = _Window(window, query, key_value, lists, weights, null_kv, multiply_keys)
            total = torch.logaddexp(at.logits.logsumexp(dim=-1), at.null_logits)
            shares = (at.logits - total.unsqueeze(-1)).exp() * at.weights
            null_shares = (at.null_logits - total).exp().unsqueeze(-1)
            out[:, window] = shares @ at.value + null_shares * at.null_value.unsqueeze(1)
            lse[:, window] = total


def backward(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    lists: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
) -> tuple[Tensor, Tensor]:
    routes = key_value.shape[1]
    dkeys = torch.zeros(key_value.shape, dtype=lse.dtype, device=query.device)
    dweights = torch.zeros(weights.shape, dtype=lse.dtype, device=query.device)
    dnull = torch.zeros(null_kv.shape, dtype=lse.dtype, device=query.device)
    with without_autocast(query):
        for window in range(query.shape[1]):
            at = _Window(window, query, key_value, lists, weights, null_kv, multiply_keys)
            dout, total = grad_output[:, window].to(lse.dtype), lse[:, window]
            delta = (dout * out[:, window]).sum(dim=-1, keepdim=True)
            shares = (at.logits - total.unsqueeze(-1)).exp()
            dshares = dout @ at.value.mT
            dlogits = shares * (dshares * at.weights - delta)
            per_head = (shares * dshares).sum(dim=2)
            if multiply_keys:
                per_head = per_head + (dlogits * at.products).sum(dim=2)
                dlogits = dlogits * at.weights
            dweights[:, window] = per_head.unflatten(1, (routes, at.share)).sum(dim=2)

            null_shares = (at.null_logits - total).exp().unsqueeze(-1)
            dnull_logits = null_shares * ((dout * at.null_value.unsqueeze(1)).sum(dim=-1, keepdim=True) - delta)
            dquery[:, window] = (dlogits @ at.key + dnull_logits * at.null_key.unsqueeze(1)) * at.scale
            dnull[0] += (dnull_logits * at.query).sum(dim=(0, 2))
            dnull[1] += (null_shares * dout).sum(dim=(0, 2))

            pair = torch.stack((dlogits.mT @ at.query, (shares * at.weights).mT @ dout))
            pair = rearrange(pair, "kv b (r h) s d -> (b r s) (h kv d)", r=routes)
            dkeys.flatten(0, 2).index_add_(0, at.rows, pair)
    dkey_value.copy_(dkeys)
    return dweights, dnull
