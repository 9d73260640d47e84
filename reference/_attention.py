"""The dense attentions that the layers are made of: for what is routed, and for the windows of an image."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from reference._arguments import check_counts, require
from reference._autocast import autocast_dtype, without_autocast
from reference._operations import choose, path
from reference.normalize import normalize


class RMSNorm(nn.Module):
    """Tokens `... d` divided by their root mean square, times a learned gain, for a linear layer to come next."""

    def __init__(self, dim: int, use_triton: bool | None = False) -> None:
        super().__init__()
        self.use_triton = use_triton
        self.gamma = nn.Parameter(torch.ones(dim))
        self._normalize = choose("normalize", normalize, use_triton)

    def extra_repr(self) -> str:
        return path("normalize", self.use_triton)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalize(x, weight=self.gamma, dtype=autocast_dtype(x))


class LayerNorm(nn.LayerNorm):
    """PyTorch's, for a linear layer to come next."""

    def __init__(self, dim: int, use_triton: bool | None = False) -> None:
        super().__init__(dim)
        self.use_triton = use_triton
        self._normalize = choose("normalize", normalize, use_triton)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {path('normalize', self.use_triton)}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        options = {"weight": self.weight, "bias": self.bias, "center": True, "eps": self.eps}
        return self._normalize(input, **options, dtype=autocast_dtype(input))


class RotaryEmbedding(nn.Module):
    """Angles `n d` of rotary position embedding (Su et al., 2104.09864), in fp32 at least."""

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000) -> None:
        super().__init__()
        require(dim % 2 == 0, "heavy_dim_head", dim, "even for a rotary embedding")
        self.dim = dim
        self.theta = theta
        self.register_buffer("inv_freq", self._frequencies(torch.get_default_dtype()))

    def _frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return self.theta ** -(torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim)

    def forward(self, seq_len: int) -> Tensor:
        # A module in half precision has its buffer rounded, by which later positions would be off by several turns.
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        frequencies = self._frequencies(dtype, self.inv_freq.device)
        positions = torch.arange(seq_len, device=frequencies.device, dtype=dtype)
        angles = positions[:, None] * frequencies
        return torch.cat((angles, angles), dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `... d` rotated in the planes of dimensions i and i + d / 2."""
    first, second = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, use_flash: bool, has_some: bool = False
) -> Tensor:
    """Softmax attention of queries `b h i d` to keys and values `b h j d`; mask broadcasts to `b h i j`.

    With `use_flash` it is PyTorch's scaled_dot_product_attention, which picks the fastest kernel that the device has
    for it. A query that may attend to nothing gives 0; `has_some` says that there is none.
    """
    nothing = None
    if mask is not None and not has_some:
        nothing = ~mask.any(dim=-1, keepdim=True)
        mask = mask | nothing
    out = (_attend_by_kernel if use_flash else _attend_by_formula)(query, key, value, mask)
    return out if nothing is None else out.masked_fill(nothing, 0.0)


def _attend_by_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    similarity = einsum(query * query.shape[-1] ** -0.5, key, "b h i d, b h j d -> b h i j")
    similarity = similarity if mask is None else similarity.masked_fill(~mask, -torch.inf)
    return einsum(similarity.softmax(dim=-1).to(value.dtype), value, "b h i j, b h j d -> b h i d")


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's, whose kernels have a first derivative only, and that in reverse mode."""
    tensors = (query, key, value)
    if torch.compiler.is_compiling():
        # No more can be asked of what it compiles.
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    if torch._C._are_functorch_transforms_active() or _are_dual(tensors):
        return _attend_by_formula(*tensors, mask)
    out = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    return _WithSecondDerivative.apply(out, *tensors, mask) if out.requires_grad else out


def _are_dual(tensors: tuple[Tensor, ...]) -> bool:
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors)


class _WithSecondDerivative(torch.autograd.Function):
    """The result of a kernel as it is. Where its gradient is to have a gradient, it is that of the formula."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # The same tensors that the kernel has saved.
        ctx.save_for_backward(query, key, value, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        *tensors, mask = ctx.saved_tensors
        # The dtype of the result is what autocast has chosen.
        query, key, value = (each.to(grad.dtype) for each in tensors)
        with without_autocast(grad):
            out = _attend_by_formula(query, key, value, mask)
        needed = ctx.needs_input_grad[1:4]
        differentiable = [each for each, wanted in zip(tensors, needed, strict=True) if wanted]
        gradients = iter(torch.autograd.grad(out, differentiable, grad, create_graph=True))
        return None, *(next(gradients) if wanted else None for wanted in needed), None


class SelfAttention(nn.Module):
    """Dense self-attention, by which the image layer's windows see themselves."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, use_triton: bool | None = False) -> None:
        super().__init__()
        check_counts(light_dim_head=dim_head, light_heads=heads)
        self.heads = heads
        self.use_triton = use_triton
        self._attend = choose("windowed_attention", _attend_to_all, use_triton)
        self.norm = RMSNorm(dim, use_triton)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def extra_repr(self) -> str:
        return path("windowed_attention", self.use_triton)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `b n d`; mask `b n`, False for tokens that nothing attends to."""
        qkv, room_for_all = self.to_qkv(self.norm(x)), max(x.shape[1], 1)
        return self.to_out(self._attend(qkv, heads=self.heads, window_size=room_for_all, mask=mask))


def _attend_to_all(qkv: Tensor, *, heads: int, window_size: int, mask: Tensor | None) -> Tensor:
    """`windowed_attention` of `b n (3 h d)` where the window has room for all."""
    query, key, value = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=heads)
    mask = None if mask is None else rearrange(mask, "b n -> b 1 1 n")
    return rearrange(attend(query, key, value, mask, use_flash=True), "b h n d -> b n (h d)")


class Rotations(NamedTuple):
    """Angles of rotary position embedding, broadcastable to queries `b h i d` and keys `b r h j d`."""

    query: Tensor
    key: Tensor
