"""One HTML page with all results of a run. It needs no network and no other file."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from colt5_bench.compare.findings import Comparison, Finding
from colt5_bench.files import atomic_write
from colt5_bench.records.columns import GRADIENT_ERROR, SHARE_OF_LIMIT, SPEED_UP, time
from colt5_bench.records.derived import (
    Interval,
    faster_from,
    format_ratio,
    group_by,
    main_column,
    mean_speed_up,
    plus_minus,
    severity,
    share_of_limit,
    short,
    spans_one,
    speed_up_intervals,
    speed_ups,
    time_intervals,
    varying_fields,
    worst_gradient,
)
from colt5_bench.records.environment import flat
from colt5_bench.records.results import Record, Run
from colt5_bench.report.figures import Card, cards
from colt5_bench.report.layout import View
from colt5_bench.report.rows import columns, command, details, rows

PAGE = "report.html"
"""Name of the page of a run, in the directory of its results."""

PASSING = ("key", "utc", "command", "expected", "gpu.at_start.sm_clock_mhz", "gpu.at_start.reasons")
"""Entries that differ between runs under the same conditions."""


OURS = "ours"
"""The implementation in headlines."""


@dataclass(frozen=True)
class Standing:
    """Results of an implementation in a suite."""

    implementation: str
    endings: str

    pairs: int
    """Number of cases with times of both this implementation and the reference."""

    speed_up: str
    """The geometric mean of the speed-ups over the reference, with its interval; empty if there are none."""

    slowest: str
    fastest: str
    """The smallest and the largest speed-up, each with its interval."""

    share_of_limit: str
    """The largest share of the limit, with its interval."""

    error: float | None
    """The largest error of any gradient, in the dtype of the section."""


@dataclass(frozen=True)
class SuiteSection:
    """Content of the page for one suite."""

    name: str
    description: str
    reference: str
    device: str
    standings: Sequence[Standing]
    dtype: str
    """The dtype whose errors are shown, if there are several. Errors of different dtypes cannot be compared."""

    endings: Sequence[str]
    """Records that are not ok, with each reason once."""

    crossover: "Crossover | None"

    cards: Sequence[Card]


@dataclass(frozen=True)
class Crossover:
    """Values of a field from which on implementations are faster than the reference."""

    field: str
    lines: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    """By implementation, a value for each line."""


@dataclass(frozen=True)
class Headline:
    """The main figure of a suite."""

    suite: str
    figure: str
    note: str


def template(name: str) -> Template:
    """A template of a page."""
    environment = Environment(
        loader=PackageLoader("colt5_bench.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["short"] = short
    return environment.get_template(name)


def write_page(
    path: Path, run: Run, views: Mapping[str, View], *, title: str = "", findings: Sequence[Finding] | None = None
) -> Path:
    """Write the page of a run.

    Args:
        path: the file. Missing directories are created.
        run: the run to show.
        views: the view of each suite, by its name.
        title: title of the page; by default the names of its suites.
        findings: findings of a comparison with a baseline, shown at the top; None without a baseline.
    """
    suites = group_by(run.records, lambda record: record.suite)
    sections = [_section(group, views.get(group[0].suite, View())) for group in suites]
    page = template("page.html").render(
        title=title or ", ".join(section.name for section in sections) or "No records",
        subtitle=", ".join(dict.fromkeys(record.device for record in run.records)),
        endings=_count_endings(run.records),
        records=len(run.records),
        sections=sections,
        headlines=[
            headline
            for group, section in zip(suites, sections, strict=True)
            if (headline := _fastest(group, section.reference) or _most_exact(section))
        ],
        environments=_environments(run),
        cut_off=[file.name for file in run.cut_off],
        comparison=None if findings is None else Comparison(findings),
        columns=columns(run.records),
        quantities={"speed_up": SPEED_UP, "share_of_limit": SHARE_OF_LIMIT, "error": GRADIENT_ERROR},
        data=_embedded(run, sections, views),
        plotly=Markup(get_plotlyjs()),
    )
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _embedded(run: Run, sections: Iterable[SuiteSection], views: Mapping[str, View]) -> Markup:
    """Input of the script of the page, as JSON that is safe within HTML."""
    content = {
        "suites": {section.name: [asdict(card) for card in section.cards] for section in sections},
        "rows": rows(run.records, views, run.environments),
        "details": [
            {
                "case": record.case,
                "reason": record.reason,
                "environment": record.environment,
                "command": command(record, run.environments),
                "sections": list(map(asdict, details(record, run.environments.get(record.environment, {})))),
            }
            for record in run.records
        ],
    }
    return Markup(to_json_plotly(content).replace("<", "\\u003c"))


def _section(records: Sequence[Record], view: View) -> SuiteSection:
    reasons = Counter((record.implementation, _status(record), record.reason) for record in records)
    dtype = str(records[0].fields.get("dtype")) if "dtype" in varying_fields(records) else ""
    return SuiteSection(
        name=records[0].suite,
        description=view.description,
        reference=view.reference,
        device=", ".join(dict.fromkeys(record.device for record in records)),
        standings=_standings(records, view.reference, dtype),
        dtype=dtype,
        endings=[
            f"{implementation}: {status}{f', {count} times' if count > 1 else ''}: {reason or 'no reason given'}"
            for (implementation, status, reason), count in reasons.items()
            if status != "ok"
        ],
        crossover=_crossover(records, view) if view.crossover else None,
        cards=cards(records, view),
    )


def _crossover(records: Sequence[Record], view: View) -> Crossover:
    found = faster_from(records, view.reference, main_column(records), view.x)
    lines = list(dict.fromkeys(line for _, line in found))
    names = dict.fromkeys(name for name, _ in found if name != view.reference)
    return Crossover(view.x, lines, {name: [found.get((name, line), "") for line in lines] for name in names})


def _standings(records: Sequence[Record], reference: str, dtype: str) -> list[Standing]:
    main = main_column(records)
    ratios, bounds = speed_ups(records, reference, main), speed_up_intervals(records, reference, main)
    known = zip(map(id, records), ratios, bounds, strict=True)
    over = {key: (ratio, interval) for key, ratio, interval in known if ratio is not None}
    uncertain = dict(zip(map(id, records), time_intervals(records, main), strict=True))
    standings = []
    for group in group_by(records, lambda record: record.implementation):
        pairs = sorted((over[id(record)] for record in group if id(record) in over), key=lambda pair: pair[0])
        shares = [(share, record) for record in group if (share := share_of_limit(record, main)) is not None]
        share, nearest = max(shares, key=lambda each: each[0], default=(None, None))
        alike = [record for record in group if not dtype or str(record.fields.get("dtype")) == dtype]
        gradients = [gradient for record in alike if (gradient := worst_gradient(record))]
        farthest = max(gradients, key=severity, default=None)
        standings.append(
            Standing(
                implementation=group[0].implementation,
                endings=_count_endings(group),
                pairs=len(pairs),
                speed_up=_mean(pairs),
                slowest=format_ratio(*pairs[0]) if pairs else "",
                fastest=format_ratio(*pairs[-1]) if pairs else "",
                share_of_limit=f"{short(100 * share)}{plus_minus(uncertain[id(nearest)])}" if share else "",
                error=farthest.largest if farthest else None,
            )
        )
    return standings


def _mean(pairs: Sequence[tuple[float, Interval | None]]) -> str:
    """Mean of speed-ups with their intervals. The reference has none."""
    noisy = [(ratio, bounds) for ratio, bounds in pairs if bounds]
    if not noisy:
        return format_ratio(1.0, None) if pairs else ""
    return format_ratio(*mean_speed_up(*zip(*noisy, strict=True)))


def _fastest(records: Sequence[Record], reference: str) -> Headline | None:
    """The speed-up of our kernels, on cases that all implementations of the whole operation share, or None."""
    main = main_column(records)
    pairs: dict[str, dict[tuple[str, str], tuple[float, Interval]]] = {}
    ratios, intervals = speed_ups(records, reference, main), speed_up_intervals(records, reference, main)
    for record, ratio, bounds in zip(records, ratios, intervals, strict=True):
        if ratio and bounds and share_of_limit(record, main) is not None:
            pairs.setdefault(record.implementation, {})[record.case, record.direction] = ratio, bounds
    shared = set.intersection(*map(set, pairs.values())) if OURS in pairs else set()
    if not shared:
        return None
    found = sorted(pairs[OURS][pair] for pair in shared)
    mean, interval = mean_speed_up(*zip(*found, strict=True))
    if spans_one(interval):
        return None
    count, unseen = len(found), sum(spans_one(bounds) for _, bounds in found)
    note = f"{OURS} over {reference}, {time(main).name}: geometric mean of {count} pair{'s' if count > 1 else ''}"
    spread = f"{format_ratio(*found[0])} to {format_ratio(*found[-1])}"
    spread = f"{unseen} of them without a significant difference" if unseen else spread
    low, high = map(short, interval)
    return Headline(records[0].suite, f"{short(mean)}x", f"{note}, {spread}; 95 % interval {low}x to {high}x")


def _most_exact(section: SuiteSection) -> Headline | None:
    """The smallest error, for a suite without times, or without a significant speed-up."""
    errors = {standing.implementation: standing.error for standing in section.standings if standing.error is not None}
    theirs = errors.pop(section.reference, None)
    if not errors or theirs is None:
        return None
    exact = min(errors, key=lambda name: inf if isnan(errors[name]) else errors[name])
    dtype = f" in {section.dtype}" if section.dtype else ""
    note = f"largest {GRADIENT_ERROR.name}{dtype}, {exact}; {section.reference}: {theirs:.1e}"
    return Headline(section.name, f"{errors[exact]:.1e}", note)


def _environments(run: Run) -> list[dict[str, Any]]:
    """Environments of records, each once, with its runs."""
    distinct: dict[tuple, dict[str, Any]] = {}
    for environment in run.environments.values():
        values = flat(environment)
        facts = {name: value for name, value in values.items() if not _passes(name) and value is not None}
        same = distinct.setdefault(tuple(map(str, facts.items())), {"facts": facts, "runs": []})
        same["runs"].append((values.get("utc"), values.get("command")))
    return list(distinct.values())


def _passes(name: str) -> bool:
    """True if a value belongs to a run, and is no condition."""
    return name in PASSING or name.startswith("options.")


def _count_endings(records: Iterable[Record]) -> str:
    counts = Counter(_status(record) for record in records)
    return ", ".join(f"{count:,} {status}" for status, count in counts.items())


def _status(record: Record) -> str:
    return record.status.replace("_", " ")
