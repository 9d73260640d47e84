"""T5's relative position bias (Raffel et al., 1910.10683), which CoLT5 (2303.09752) has in its attention."""

from math import log

BUCKETS = 32
FARTHEST = 128
"""All distances from this one on share a bucket."""


def buckets_of_distances(reach: int, causal: bool) -> list[int]:
    """The buckets of distances from a query to a key, from `-reach` to `reach`.

    Half of the buckets have one distance each; the others get wider with distance. If causal, all buckets are for keys
    before the query, otherwise half of them. Later keys, which causal attention does not see, are then in the first
    bucket.
    """
    if causal:
        return [_bucket(max(-distance, 0), BUCKETS) for distance in range(-reach, reach + 1)]
    half = BUCKETS // 2
    return [_bucket(abs(distance), half) + (half if distance > 0 else 0) for distance in range(-reach, reach + 1)]


def _bucket(distance: int, buckets: int) -> int:
    exact = buckets // 2
    if distance < exact:
        return distance
    grown = (buckets - exact) * log(distance / exact) / log(FARTHEST / exact)
    return min(exact + int(grown), buckets - 1)
