"""Fused Triton kernels for the operations of `reference`, with the same signatures, and its layers made of them."""

from kernels._common.replay import replay as replay
from kernels.biased_gelu import biased_gelu
from kernels.combine import combine
from kernels.coor_descent import coor_descent
from kernels.gathered_attention import gathered_attention
from kernels.layers import (
    ConditionalRoutedAttention,
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
    ConditionalRoutedViT,
    CoordinateDescentRouter,
)
from kernels.layers import played as played
from kernels.normalize import normalize
from kernels.normalize_and_route import normalize_and_route
from kernels.route import route
from kernels.route_prefixes import route_prefixes
from kernels.routed_attention import routed_attention
from kernels.routing_scores import routing_scores
from kernels.segmented_coor_descent import segmented_coor_descent
from kernels.select import select
from kernels.soft_topk import soft_topk
from kernels.topk import topk
from kernels.windowed_attention import windowed_attention

__all__ = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "biased_gelu",
    "combine",
    "coor_descent",
    "gathered_attention",
    "normalize",
    "normalize_and_route",
    "route",
    "route_prefixes",
    "routed_attention",
    "routing_scores",
    "segmented_coor_descent",
    "select",
    "soft_topk",
    "topk",
    "windowed_attention",
]
