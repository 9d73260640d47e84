"""The CoLT5 system in plain PyTorch: the definition with which every kernel is compared."""

from reference._shared.returns import NormalizedRouteReturn, PrefixSelection, RouteReturn, TopkReturn
from reference.biased_gelu import biased_gelu
from reference.combine import combine
from reference.coor_descent import coor_descent
from reference.gathered_attention import gathered_attention
from reference.layers.attention import ConditionalRoutedAttention
from reference.layers.autoregressive import ConditionalRoutedAutoregressiveAttention
from reference.layers.block import ConditionalRoutedTransformerBlock
from reference.layers.cross import ConditionalRoutedCrossAttention
from reference.layers.feedforward import ConditionalRoutedFeedForward
from reference.layers.image import ConditionalRoutedImageAttention
from reference.layers.router import CoordinateDescentRouter, RouterReturn
from reference.layers.vit import ConditionalRoutedViT
from reference.normalize import normalize
from reference.normalize_and_route import normalize_and_route
from reference.route import route
from reference.route_prefixes import route_prefixes
from reference.routed_attention import routed_attention
from reference.routing_scores import routing_scores
from reference.select import select
from reference.soft_topk import soft_topk
from reference.topk import topk
from reference.windowed_attention import windowed_attention

__all__ = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "NormalizedRouteReturn",
    "PrefixSelection",
    "RouteReturn",
    "RouterReturn",
    "TopkReturn",
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
    "select",
    "soft_topk",
    "topk",
    "windowed_attention",
]
