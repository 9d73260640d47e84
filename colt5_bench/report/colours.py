"""The colour and the marker of each implementation, which are the same in every plot."""

from zlib import crc32

PALETTE = (
    # Colours of Okabe and Ito, which are distinct for every kind of colour vision.
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    # Other colours that are visible on light and on dark.
    *("#999933", "#C2456F", "#44AA99", "#8C7AE6", "#B0603A", "#3E8E41", "#A05195", "#8C6D4B", "#6B7A8F"),
    *("#B8860B", "#6A5ACD", "#E07A5F", "#2F8F9D"),
)

NAMED = (
    *("reference", "ours", "colt5_triton", "colt5_plain", "segmented", "compile", "colt5_triton_segmented"),
    *("dense", "dense_flash", "sdpa", "flex", "torch", "torch_topk", "masked_rows", "t5", "longt5"),
    *("flashinfer_topk", "quack_topk", "softtorch", "liger"),
)
"""Implementations with a fixed colour, in the order of the palette. Others get one by a hash of their name, but none
of the first two."""

TRAINED = (
    *("light", "light_wide", "hybrid", "published", "zero", "cosine", "exact", "cosine_exact"),
    *("sets_2", "sets_4", "frozen", "random", "noncausal"),
    *("rotary", "light_rotary", "zero_fp32", "zero_plain"),
)
"""Kinds of attention that are trained together, and with `dense`. They share colours with implementations that
are never in one plot with them."""

SPARSE = (
    *("mosa", "mixture_of_depths", "moba", "fla_moba", "nsa", "fla_nsa"),
    *("selected", "attn_gym_gather", "entmax", "adasplash"),
)
"""Sparse attention, shown with `dense` and `dense_flash`. It shares colours in the same way."""

_PLACES = {
    **{name: place for place, name in enumerate(NAMED)},
    **dict(zip(SPARSE, (each for each in range(2, len(PALETTE)) if not NAMED[each].startswith("dense")), strict=False)),
    **dict(zip(TRAINED, (each for each in range(2, len(PALETTE)) if NAMED[each] != "dense"), strict=True)),
}


def place(implementation: str) -> int:
    """The place of an implementation in the palette, and in a list of markers."""
    if implementation in _PLACES:
        return _PLACES[implementation]
    return 2 + crc32(implementation.encode(errors="surrogatepass")) % (len(PALETTE) - 2)


def colour(implementation: str) -> str:
    """The colour of an implementation."""
    return PALETTE[place(implementation)]
