"""Softmax attention, on which the attention layers are built."""

from torch import Tensor

from reference._shared.sdpa import attend_by_formula, scaled_dot_product_attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    use_flash: bool,
    has_some: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of queries `b h i d` to keys and values `b h j d`; mask broadcasts to `b h i j`.

    With `use_flash` it uses PyTorch's scaled_dot_product_attention, which picks the fastest kernel of the device. A
    bias, which broadcasts to `b h i j`, is added to the logits; with a bias, the formula is computed. A query that may
    attend to nothing gives 0; pass `has_some` if there is no such query.
    """
    nothing = None
    if mask is not None and not has_some:
        nothing = ~mask.any(dim=-1, keepdim=True)
        mask = mask | nothing
    if use_flash and bias is None:
        out = scaled_dot_product_attention(query, key, value, mask)
    else:
        out = attend_by_formula(query, key, value, mask, bias)
    return out if nothing is None else out.masked_fill(nothing, 0.0)
