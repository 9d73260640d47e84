"""The router: selects tokens for a heavy branch, by a relaxed top-k of their product with a routing token."""

from math import ceil
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from reference._shared.arguments import (
    Solver,
    check_counts,
    check_integers,
    check_positive,
    check_scale,
    check_schedule,
    check_tokens,
    require,
)
from reference._shared.autocast import without_autocast
from reference._shared.returns import RouteReturn
from reference._shared.sizes import ceil_div, is_certain, missing
from reference.layers.operations import Operations, UseTriton
from reference.route import gather_tokens, in_blocks, pass_through, positions


class Selection(NamedTuple):
    """Entries that a router selects from rows `... n`, each `... k`, the largest score first."""

    indices: Tensor
    """int64. Past the end of the row if a padded last block has no more tokens to select."""

    weights: Tensor
    """The relaxed selection, 1 in value if it is passed straight through; 0 for masked entries."""

    mask: Tensor | None
    """False if a row has no more entries to select; None if that is impossible."""


class RouterReturn(NamedTuple):
    """Routed tokens. If there are several routes, each tensor has a dimension of routes after the batch.

    indices: `b (r) k`, None if all tokens are routed because there are no more than k; scores: `b (r) k`, factors for
    the results of the heavy branch; routed_tokens: `b (r) k d`; routed_mask: `b (r) k`, False for tokens that are
    routed only because there are too few others, None if there are no such tokens.
    """

    indices: Tensor | None
    scores: Tensor
    routed_tokens: Tensor
    routed_mask: Tensor | None


def is_selected(x: Tensor, mask: Tensor | None, indices: Tensor, more: int) -> Tensor | None:
    """A mask of routed tokens of `b n d` from that of all, `b n`; None if all routed tokens are valid.

    Args:
        indices: `b r k`, some of which may be past the end by less than `more`.
    """
    if mask is None:
        return None if is_certain(more == 0) else indices < x.shape[1]
    filled_up = mask if is_certain(more == 0) else F.pad(mask, (0, more))
    return filled_up[:, None].expand(*indices.shape[:2], -1).gather(-1, indices)


# `torch.export` saves a router with this name and needs it to load the router.
_register_namedtuple(RouterReturn, serialized_type_name="reference.router.RouterReturn")


class CoordinateDescentRouter(nn.Module):
    """Routes the tokens with the largest scores, with a gradient for all scores (CoLT5, 2303.09752, 3.1).

    A token's score is its product with a routing token. Tokens are selected by score. The weights of selected tokens
    come from coordinate descent over all scores, and are 1 in value if `straight_through`.

    Args:
        dim: size of a token.
        straight_through: weights are 1 in value and keep their gradient.
        n_iters, eps, eps_decay, eps_init: as in `reference.coor_descent`.
        fetch_k_ratio: at least 1; see `normalize_to`.
        num_routing_tokens: number of routes; each has its own routing token and its own selection.
        learned_routing_tokens: routing tokens are passed to `forward`; the router has none.
        use_triton: True: kernels, which also have a CPU path; False: plain PyTorch; None: kernels for CUDA tensors. The
            operation `route` does everything, except with `random_route`: then scores, relaxed selection and choice are
            separate operations. A layer passes its `Operations` on to the layers that it contains.
        cosine_sim_routing, cosine_sim_scale: the score is the cosine times this scale, instead of the product.
        route_block_size: number of tokens per block, if the same number of tokens is selected from each block. The last
            block may be shorter. That number depends on the length, so a router exported with kernels takes only
            lengths with the same number per block.
        triton_checkpoint_segments: number of segments, for comparisons with the published algorithm: with `use_triton`,
            coordinate descent uses the kernel that saves the state of each segment. The default kernel saves one number
            per iteration. The operations around it are then separate, too.
        solver: `coor_descent`, or `exact`: the solution that it converges to at temperature eps. After too few
            iterations of coordinate descent all selected entries may be 1, where they have no gradient.
        normalize_to: sum of the relaxed selection. `fetched`: fetch_k_ratio times the number of selected tokens.
            `selected`: the number of tokens to route, while fetch_k_ratio times as many are selected and have weights,
            as in the paper. With the exact solver some weights are then below 1 for any scores.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        straight_through: bool = True,
        n_iters: int = 20,
        fetch_k_ratio: float = 9 / 8,
        eps: float = 0.03,
        eps_decay: float = 0.7,
        eps_init: float = 4.0,
        num_routing_tokens: int = 1,
        learned_routing_tokens: bool = False,
        use_triton: UseTriton = False,
        cosine_sim_routing: bool = False,
        cosine_sim_scale: float = 8,
        route_block_size: int | None = None,
        triton_checkpoint_segments: int | None = None,
        solver: Solver = "coor_descent",
        normalize_to: Literal["fetched", "selected"] = "fetched",
    ) -> None:
        super().__init__()
        check_positive(fetch_k_ratio=fetch_k_ratio)
        require(fetch_k_ratio >= 1, "fetch_k_ratio", fetch_k_ratio, ">= 1")
        check_counts(dim=dim, num_routing_tokens=num_routing_tokens)
        optional = {"route_block_size": route_block_size, "triton_checkpoint_segments": triton_checkpoint_segments}
        for option, count in optional.items():
            if count is not None:
                check_integers(**{option: count})
                require(count >= 1, option, count, "None or >= 1")
        check_schedule(n_iters, eps, eps_init, eps_decay)
        check_scale(cosine_sim_scale)
        require(solver in ("coor_descent", "exact"), "solver", solver, "coor_descent or exact")
        require(normalize_to in ("fetched", "selected"), "normalize_to", normalize_to, "fetched or selected")
        self.dim = dim
        self.straight_through = straight_through
        self.n_iters, self.eps, self.eps_decay, self.eps_init = n_iters, eps, eps_decay, eps_init
        self.fetch_k_ratio = fetch_k_ratio
        self.num_routing_tokens = num_routing_tokens
        self.cosine_sim_routing, self.cosine_sim_scale = cosine_sim_routing, cosine_sim_scale
        self.route_block_size = route_block_size
        self.operations = Operations.of(use_triton)
        self.use_triton = self.operations.use_triton
        self.solver = solver
        self.normalize_to = normalize_to

        self.checkpoint_segments = triton_checkpoint_segments if self.use_triton else None
        self.routing_token = None if learned_routing_tokens else nn.Parameter(torch.randn(num_routing_tokens, dim))

    def extra_repr(self) -> str:
        way = "plain PyTorch"
        if self.use_triton:
            way = "kernels.route" if self.checkpoint_segments is None else "kernels.segmented_coor_descent and others"
        elif self.use_triton is None:
            way = f"kernels.route for CUDA tensors, else {way}"
        return (
            f"num_routing_tokens={self.num_routing_tokens}, solver={self.solver!r}, n_iters={self.n_iters}, "
            f"eps={self.eps:g}, normalize_to={self.normalize_to!r}, route_block_size={self.route_block_size}, "
            f"use_triton={self.use_triton} ({way})"
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_tokens: int,
        mask: Tensor | None = None,
        random_route: bool = False,
        routing_tokens: Tensor | None = None,
        keep_one_route_dim: bool = False,
    ) -> RouterReturn:
        """Route tokens `b n d`.

        Args:
            num_tokens: number of tokens to route; with blocks, rounded up to a multiple of their number. All tokens are
                routed if there are no more.
            mask: `b n`, False for masked tokens, which take no part.
            random_route: select at random, as a control.
            routing_tokens: `b d` or `b r d`, override the router's own.
            keep_one_route_dim: results always have a dimension of routes, even of size 1.

        Raises:
            ValueError: shapes do not match, or there is no routing token.
        """
        check_tokens(x, self.dim, mask)
        check_counts(num_tokens=num_tokens)
        self.check_random(random_route)
        routes, n = self.num_routing_tokens, self.operations.length(x)
        if n <= num_tokens:
            routed_mask = None if mask is None else repeat(mask, "b n -> b r n", r=routes)
            scores = x.new_ones(x.shape[0], routes, x.shape[1])
            routed = RouterReturn(None, scores, repeat(x, "b n d -> b r n d", r=routes), routed_mask)
        else:
            routed = self._route_some(x, self._routing_tokens(x, routing_tokens), n, num_tokens, mask, random_route)
        if keep_one_route_dim or routes > 1:
            return routed
        indices, scores, tokens, routed_mask = routed
        return RouterReturn(
            None if indices is None else indices.squeeze(1),
            scores.squeeze(1),
            tokens.squeeze(1),
            None if routed_mask is None else routed_mask.squeeze(1),
        )

    def check_random(self, random_route: bool) -> None:
        """Refuse random routes for parts of a sequence, because each rank would draw other numbers."""
        if random_route and self.operations.shards_of is not None:
            raise NotImplementedError("random_route must be False for a sequence that is sharded, got True")

    def _route_some(
        self, x: Tensor, routing_tokens: Tensor, n: int, num_tokens: int, mask: Tensor | None, random_route: bool
    ) -> RouterReturn:
        """Route fewer than all n tokens of the sequence, with a dimension of routes."""
        per_route = None if mask is None else rearrange(mask, "b n -> b 1 n")
        if random_route or self.checkpoint_segments is not None:
            selection = self.select(self._score(x, routing_tokens), num_tokens, per_route, random_route)
            tokens = gather_tokens(x, selection.indices)
            return RouterReturn(selection.indices, selection.weights.to(x.dtype), tokens, selection.mask)

        size = self._block_size(n)
        each = num_tokens if size is None else ceil_div(num_tokens, ceil_div(n, size))
        indices, weights, tokens = self._route(x, routing_tokens, each, n if size is None else size, size, mask)
        # With parts of a sequence, lists of a rank are padded with the first place past its end.
        more = 1 if self.operations.shards_of is not None else 0 if size is None else missing(n, size)
        return RouterReturn(indices, weights.to(x.dtype), tokens, is_selected(x, mask, indices, more))

    def _route(
        self,
        x: Tensor,
        routing_tokens: Tensor,
        num_tokens: int,
        width: int,
        block_size: int | None,
        mask: Tensor | None = None,
    ) -> RouteReturn:
        """Route `num_tokens` of a row of `width` tokens, or of each block if there are blocks, in one operation."""
        options = self._choice(num_tokens, width)
        options |= {"cosine_sim_scale": self._cosine_sim_scale, "block_size": block_size, "mask": mask}
        routed: RouteReturn = self.operations.route(x, routing_tokens, **options)
        return routed

    def _choice(self, num_tokens: int, n: int) -> dict[str, Any]:
        """Arguments of `route` for selecting `num_tokens` of n tokens by their scores."""
        return {
            "num_selected": self.num_selected(num_tokens, n),
            **self.relaxation(num_tokens, n),
            "n_iters": self.n_iters,
            "solver": self.solver,
            "straight_through": self.straight_through,
        }

    def choice_of_all(self, n: int, num_tokens: int) -> dict[str, Any] | None:
        """Arguments of `normalize_and_route` for selecting `num_tokens` of n tokens. None if the operation cannot route
        as this router does, or there is nothing to choose."""
        takes = self.routing_token is not None and not self.cosine_sim_routing and self.takes_windows(n)
        return self._choice(num_tokens, n) if takes and n > num_tokens else None

    def route_windows(self, x: Tensor, window_size: int, num_tokens: int, routing_tokens: Tensor | None) -> RouteReturn:
        """Route `num_tokens` of each window of `b n d` in one operation, which exists if `takes_windows`."""
        return self._route(x, self._routing_tokens(x, routing_tokens), num_tokens, window_size, window_size)

    def takes_windows(self, window_size: int) -> bool:
        """True if one operation can route from windows of that size, and they are not divided into blocks."""
        return self.checkpoint_segments is None and self._block_size(window_size) is None

    def _routing_tokens(self, x: Tensor, routing_tokens: Tensor | None) -> Tensor:
        """The router's own routing tokens as `1 r d`, or the passed ones as `b r d`."""
        if routing_tokens is None:
            if self.routing_token is None:
                raise ValueError("routing_tokens must be a tensor where learned_routing_tokens is set, got None")
            routing_tokens = rearrange(self.routing_token, "r d -> 1 r d")
        elif routing_tokens.dim() == 2:
            routing_tokens = rearrange(routing_tokens, "b d -> b 1 d")
        shape = routing_tokens.shape
        fits = (shape[0] == 1 or shape[0] == x.shape[0]) and shape[1:] == (self.num_routing_tokens, x.shape[-1])
        expected = (x.shape[0], self.num_routing_tokens, x.shape[-1])
        require(fits, "routing_tokens", shape, "of shape {}", expected)
        return routing_tokens

    def score(self, x: Tensor, routing_tokens: Tensor | None = None) -> Tensor:
        """Scores `b r n` of tokens `b n d`, in fp32 at least."""
        return self._score(x, self._routing_tokens(x, routing_tokens))

    def _score(self, x: Tensor, routing_tokens: Tensor) -> Tensor:
        scores: Tensor = self.operations.routing_scores(x, routing_tokens, cosine_sim_scale=self._cosine_sim_scale)
        return scores

    @property
    def _cosine_sim_scale(self) -> float | None:
        return self.cosine_sim_scale if self.cosine_sim_routing else None

    def _block_size(self, n: int) -> int | None:
        """Size of blocks. None if there is only one block, which needs no padding."""
        return None if self.route_block_size is None or n <= self.route_block_size else self.route_block_size

    def select(
        self, scores: Tensor, num_tokens: int, mask: Tensor | None = None, random_route: bool = False
    ) -> Selection:
        """Select from rows `... n` of scores, in blocks if there are any; mask broadcasts to `... n`."""
        n = scores.shape[-1]
        size = self._block_size(n)
        each = num_tokens if size is None else ceil_div(num_tokens, ceil_div(n, size))
        scores, mask = in_blocks(scores, mask, size)
        relaxed = self.relax(scores, each, mask)
        # By score, not by weight: weights that are saturated at 1 are all equal.
        candidates = torch.rand_like(scores) if random_route else scores
        indices = self.operations.select(candidates, num_selected=self.num_selected(each, scores.shape[-1]), mask=mask)
        weights = relaxed.gather(-1, indices)
        selected = None if mask is None else mask.expand(scores.shape).gather(-1, indices)
        if size is not None:
            indices, weights = positions(indices, size), weights.flatten(-2)
            selected = None if selected is None else selected.flatten(-2)
        return self.weighed(indices, weights, selected)

    def weighed(self, indices: Tensor, weights: Tensor, selected: Tensor | None) -> Selection:
        """A selection with its final weights, which are 0 for entries that were not selected."""
        weights = pass_through(weights) if self.straight_through else weights
        return Selection(indices, weights if selected is None else weights.masked_fill(~selected, 0.0), selected)

    def num_selected(self, num_tokens: int, n: int) -> int:
        """Number of selected entries among n if `num_tokens` are requested."""
        return min(num_tokens if self.normalize_to == "fetched" else ceil(num_tokens * self.fetch_k_ratio), n)

    def relax(self, scores: Tensor, num_tokens: int, mask: Tensor | None = None) -> Tensor:
        """The relaxed selection of `num_tokens` from rows `... n`."""
        relaxation = self.relaxation(num_tokens, scores.shape[-1])
        with without_autocast(scores):
            relaxed: Tensor
            if self.solver == "exact":
                relaxed = self.operations.soft_topk(scores, k=relaxation["k"], eps=self.eps, mask=mask)
            else:
                relaxed = self._descend(scores, n_iters=self.n_iters, mask=mask, **relaxation)
            return relaxed

    def _descend(self, scores: Tensor, **options: Any) -> Tensor:
        if self.checkpoint_segments is None or self.operations.segmented_coor_descent is None:
            return self.operations.coor_descent(scores, **options)
        segmented = self.operations.segmented_coor_descent
        return segmented(scores, checkpoint_segments=self.checkpoint_segments, **options)

    def relaxation(self, num_tokens: int, n: int) -> dict[str, Any]:
        """Arguments of coordinate descent over rows of n: the target sum of a row, and the temperatures."""
        fetched = num_tokens * (self.fetch_k_ratio if self.normalize_to == "fetched" else 1.0)
        return {"k": min(fetched, n), "eps": self.eps, "eps_init": self.eps_init, "eps_decay": self.eps_decay}

    def route_back(self, src: Tensor, routed_tokens: Tensor, indices: Tensor) -> Tensor:
        """src `b n d` with routed tokens `b k d` in their places `b k`; indices past the end have no place."""
        n = src.shape[1]
        places = repeat(indices.clamp(max=n), "b k -> b k d", d=src.shape[-1])
        # Tokens without a place are written to an additional row.
        return F.pad(src, (0, 0, 0, 1)).scatter_(1, places, routed_tokens.to(src.dtype))[:, :n]
