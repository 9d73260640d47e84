"""Error rates of verdicts on times, from simulated runs with a known change.

Each comparison has 77 equal times, and one each that takes 5, 10 and 25 % longer, at a threshold of 5 %. Every sample
has 1 % of its own noise (standard deviation). Each time in each run has the noise of a model in addition.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from colt5_bench.compare.revisions import MOST_TURNS, TURNS
from colt5_bench.records.samples import (
    Changes,
    Level,
    changes,
    holm,
    judge,
    of_one_run,
    of_runs,
    rank_test,
    reaching,
    runs_that_confirm,
)

Array = NDArray[Any]

EQUAL, SLOWDOWNS, THRESHOLD = 77, (0.05, 0.10, 0.25), 0.05
COMPARISONS, AT_ONCE = 300, 25

MOST_FALSE_ALARMS = 0.01
"""Share of comparisons in which an equal time may be called worse."""

AIMED_AT, FEWEST_FOUND, LOUDEST = SLOWDOWNS.index(0.10), 0.95, 0.03
"""A slowdown by its index, the share of it to find in turns, and the noise for which this holds.

The noise is the standard deviation between runs. With more noise, or for saved runs of one process each, this share has
to be found or unclear.
"""

SAMPLES = (3, 10, 30, 100)

SPREAD = 0.01
DRIFT, CORRELATION, CORRELATED, OFFSET, GAP = 0.08, 0.9, 0.03, 0.03, 0.2

Noise = Callable[[np.random.Generator, tuple[int, ...]], Array]
"""Makes noise of the logarithms of samples. The last axis of the shape has the samples of a run."""


def _none(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape, np.float32)


def _drift(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (
        DRIFT
        * (2 * generator.random((*shape[:-1], 1), np.float32) - 1)
        * np.linspace(0, 1, shape[-1], dtype=np.float32)
    )


def _correlated(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    own = CORRELATED * np.sqrt(1 - CORRELATION**2) * generator.standard_normal(shape, np.float32)
    own[..., 0] /= np.sqrt(1 - CORRELATION**2)
    return np.asarray(lfilter(np.ones(1, np.float32), np.array([1, -CORRELATION], np.float32), own, axis=-1))


def _offset(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(OFFSET * generator.standard_normal((*shape[:-1], 1), np.float32), shape)


def _modes(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return GAP * (generator.random(shape, np.float32) < generator.random((*shape[:-1], 1)))


MODELS: Mapping[str, Noise] = {
    "none": _none,
    f"drift of up to {DRIFT:.0%} within a run": _drift,
    f"autocorrelation {CORRELATION} of {CORRELATED:.0%}": _correlated,
    f"an offset of {OFFSET:.0%} a run": _offset,
    f"two modes {GAP:.0%} apart, shares differ by run": _modes,
}


@dataclass(frozen=True)
class Outcome:
    """Counts of all comparisons under one model with one number of samples."""

    false_alarms: int
    """Comparisons in which an equal time is called worse."""

    found: tuple[float, ...]
    """By slowdown, the share that is called worse."""

    missed: tuple[float, ...]
    """By slowdown, the share that is called the same or better. The rest is unclear."""


@dataclass(frozen=True)
class Row:
    """A model and a number of samples."""

    model: str
    samples: int

    between_runs: float
    """Standard deviation of the logarithms of the medians of runs of equal code."""

    in_turns: Outcome
    """Outcome of turns, as `compare A B` measures revisions."""

    saved: Outcome
    """Outcome for two saved runs of one process each."""


def simulate(comparisons: int = COMPARISONS, samples: tuple[int, ...] = SAMPLES, seed: int = 0) -> Iterator[Row]:
    """All models with each number of samples."""
    for number, (model, noise) in enumerate(MODELS.items()):
        for count in samples:
            generator = np.random.default_rng([seed, number, count])
            compared = [
                _compare(noise, generator, min(AT_ONCE, comparisons - begun), count)
                for begun in range(0, comparisons, AT_ONCE)
            ]
            in_turns, saved, variance = (np.concatenate(each) for each in zip(*compared, strict=True))
            yield Row(model, count, float(np.sqrt(variance.mean())), _outcome(in_turns), _outcome(saved))


def meets_aim(row: Row, comparisons: int = COMPARISONS) -> bool:
    """True if false alarms are rare enough, and slowdowns are found often enough."""
    outcomes = row.in_turns, row.saved
    decidable = round(row.between_runs, 2) <= LOUDEST
    return (
        all(outcome.false_alarms <= MOST_FALSE_ALARMS * comparisons for outcome in outcomes)
        and all(outcome.missed[AIMED_AT] <= 1 - FEWEST_FOUND for outcome in outcomes)
        and (not decidable or row.in_turns.found[AIMED_AT] >= FEWEST_FOUND)
    )


def markdown(rows: Sequence[Row], comparisons: int = COMPARISONS) -> str:
    """A table for the documentation, with the shares of slowdowns that are called worse, and the same."""
    slowdowns = [f"{slowdown:.0%}" for slowdown in SLOWDOWNS]
    heads = [f"{how}: {what}" for how in ("in turns", "saved") for what in ("false alarms", *slowdowns)]
    columns = "samples", "runs differ by", *heads
    lines = [f"| noise | {' | '.join(columns)} | meets the aim |", f"|---|{'---:|' * len(columns)}---|"]
    for row in rows:
        figures = [cell for outcome in (row.in_turns, row.saved) for cell in _cells(outcome, comparisons)]
        cells = row.model, str(row.samples), f"{row.between_runs:.0%}", *figures
        lines.append(f"| {' | '.join(cells)} | {'yes' if meets_aim(row, comparisons) else 'no'} |")
    return "\n".join(lines)


def _cells(outcome: Outcome, comparisons: int) -> list[str]:
    shares = zip(outcome.found, outcome.missed, strict=True)
    return [f"{outcome.false_alarms} of {comparisons}", *(f"{found:.0%} / {missed:.0%}" for found, missed in shares)]


def _compare(noise: Noise, generator: np.random.Generator, comparisons: int, samples: int) -> tuple[Array, ...]:
    """The meaning of each time of each comparison, and the variance of its medians between runs. Meanings are for
    times measured in turns, and for the first run of each side alone."""
    shape = comparisons, EQUAL + len(SLOWDOWNS), MOST_TURNS, samples
    sides = [SPREAD * generator.standard_normal(shape, np.float32) + noise(generator, shape) for _ in range(2)]
    slower = np.concatenate([np.zeros(EQUAL), np.log1p(SLOWDOWNS)])
    sides[1] += slower[:, None, None]
    before, after = (side[..., 0, :] for side in sides)
    saved = _judge(changes(of_one_run(before), of_one_run(after), reaching(np.exp(before), np.exp(after))))
    middles = [_medians(side) for side in sides]
    return _in_turns(middles), saved, middles[0].var(-1, ddof=1)


def _medians(samples: Array) -> Array:
    """The same as `np.median` of the last axis, which takes ten times as long as a sort."""
    count = samples.shape[-1]
    return np.asarray(np.sort(samples, axis=-1)[..., [(count - 1) // 2, count // 2]].mean(-1))


def _in_turns(middles: list[Array]) -> Array:
    """The turns of all times, then more turns of unclear ones."""
    needed = runs_that_confirm(middles[0].shape[-2])
    turns, again = 0, np.full(middles[0].shape[:-1], True)
    levels, ranks = [Level(*(np.zeros(again.shape) for _ in range(4)))] * 2, np.zeros(again.shape)
    while turns < MOST_TURNS and again.any():
        turns += TURNS
        so_far = [side[..., :turns] for side in middles]
        levels = [
            Level(*(np.where(again, *both) for both in zip(of_runs(side), old, strict=True)))
            for side, old in zip(so_far, levels, strict=True)
        ]
        ranks = np.where(again, rank_test(*so_far) if turns >= needed else 0, ranks)
        meaning = _judge(changes(levels[0], levels[1], ranks))
        again = np.isnan(meaning) | ((meaning == 1) & (levels[1].runs < needed))
    return meaning


def _judge(found: Changes) -> Array:
    return judge(found, holm(found.p), np.log1p(THRESHOLD))


def _outcome(meaning: Array) -> Outcome:
    planted = meaning[:, EQUAL:]
    return Outcome(
        int((meaning[:, :EQUAL] == 1).any(-1).sum()),
        tuple(map(float, (planted == 1).mean(0))),
        tuple(map(float, (planted <= 0).mean(0))),
    )
