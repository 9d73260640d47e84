"""The CoLT5 system in plain PyTorch: the definition every kernel is compared with."""

from reference.attention import ConditionalRoutedAttention, ConditionalRoutedCrossAttention
from reference.autoregressive import ConditionalRoutedAutoregressiveAttention
from reference.block import ConditionalRoutedTransformerBlock
from reference.coor_descent import coor_descent
from reference.feedforward import ConditionalRoutedFeedForward
from reference.gathered_attention import gathered_attention
from reference.image import ConditionalRoutedImageAttention
from reference.route_prefixes import PrefixSelection, route_prefixes
from reference.router import CoordinateDescentRouter, RouterReturn
from reference.soft_topk import soft_topk
from reference.topk import TopkReturn, topk
from reference.vit import ConditionalRoutedViT

__all__ = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "PrefixSelection",
    "RouterReturn",
    "TopkReturn",
    "coor_descent",
    "gathered_attention",
    "route_prefixes",
    "soft_topk",
    "topk",
]
