"""A comparison for people, for programs, for a pull request, and for what collects test results."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colt5_bench.compare.findings import Comparison, Finding
from colt5_bench.report.layout import by
from colt5_bench.report.rows import sayable
from colt5_bench.report.table import print_whole

FORMATS = ("text", "json", "markdown", "junit")

STYLES = {"failed": "red", "missing": "red", "worse": "red", "unclear": "yellow", "new": "dim", "better": "green"}

HEADERS = ("verdict", "case", "implementation", "metric", "baseline", "now", "change", "note")
NUMBERS = ("baseline", "now", "change")

MOST_ROWS = 100
"""Of the table for a pull request, which GitHub cuts off; regressions come first."""


def write(comparison: Comparison, form: str) -> None:
    """Print a comparison in one of `FORMATS`."""
    if form == "text":
        show(comparison, Console())
    else:
        print({"json": as_json, "markdown": as_markdown, "junit": as_junit}[form](comparison))


def show(comparison: Comparison, console: Console) -> None:
    """A table of what is not the same for each suite, then what has to be known, then how many there are of each."""
    for own in by(comparison.telling(), lambda finding: finding.suite):
        table = Table(title=own[0].suite, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in HEADERS:
            table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
        for finding in own:
            table.add_row(*map(Text, _cells(finding)), style=STYLES[finding.verdict])
        print_whole(table, console)
    for note in (*comparison.notes, *comparison.summed_up()):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"against the baseline: {comparison.counts}", highlight=False, soft_wrap=True)


def as_json(comparison: Comparison) -> str:
    """All findings. JSON has no NaN and no infinity: they are said by name."""
    findings = [
        {**asdict(finding), "baseline": sayable(finding.baseline), "now": sayable(finding.now)}
        for finding in comparison.findings
    ]
    counts = {"regressions": len(comparison.regressions), "undecided": len(comparison.undecided)}
    content = {**counts, "notes": list(comparison.notes), "findings": findings}
    return json.dumps(content, indent=2, allow_nan=False)


def as_markdown(comparison: Comparison) -> str:
    """A heading, notes and a table of what is not the same."""
    count = len(comparison.regressions)
    verdict = f"{count} regression{'s' if count > 1 else ''}" if count else "No regression"
    verdict = "Undecided" if comparison.undecided and not count else verdict
    lines = [f"### {verdict} against the baseline", "", comparison.counts, ""]
    lines += [f"- {_escaped(note)}" for note in (*comparison.notes, *comparison.summed_up())]
    shown = comparison.telling()
    if shown:
        headers = ("verdict", "suite", *HEADERS[1:])
        lines += ["", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for finding in shown[:MOST_ROWS]:
        verdict, *rest = map(_escaped, _cells(finding))
        verdict = f"**{verdict}**" if finding.is_regression else verdict
        lines.append(f"| {' | '.join((verdict, finding.suite, *rest))} |")
    if len(shown) > MOST_ROWS:
        lines += ["", f"and {len(shown) - MOST_ROWS:,} more"]
    return "\n".join(lines) + "\n"


def as_junit(comparison: Comparison) -> str:
    """A test for each finding, which fails if it is a regression."""
    root = ElementTree.Element("testsuites", {"name": "colt5-bench", **_counted(comparison.findings)})
    for own in by(comparison.findings, lambda finding: finding.suite):
        suite = ElementTree.SubElement(root, "testsuite", {"name": own[0].suite, **_counted(own)})
        for finding in own:
            test = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{finding.suite}.{finding.implementation}",
                name=f"{finding.case} {finding.direction} {finding.metric}",
            )
            said = f"{finding.verdict}: {finding.said_baseline} -> {finding.said_now} {finding.change}".rstrip()
            if finding.is_regression:
                ElementTree.SubElement(test, "failure", message=said, type=finding.verdict).text = finding.note
            elif finding.verdict != "same":
                ElementTree.SubElement(test, "system-out").text = said
        if comparison.notes:
            ElementTree.SubElement(suite, "system-out").text = "\n".join(comparison.notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def append_summary(comparison: Comparison) -> None:
    """To the summary of a job of GitHub Actions, if this is one."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as summary:
            summary.write(as_markdown(comparison))


def _cells(finding: Finding) -> tuple[str, ...]:
    """In the order of `HEADERS`."""
    case = f"{finding.case if finding.label is None else finding.label} {finding.direction}".lstrip()
    interval = ""
    if finding.interval:
        low, high = (f"{100 * (bound - 1):+.1f}" for bound in finding.interval)
        interval = f"time {low} to {high} %"
    note = "; ".join(part for part in (interval, finding.note) if part)
    return (
        finding.verdict,
        case,
        finding.implementation,
        finding.metric,
        finding.said_baseline,
        finding.said_now,
        finding.change,
        note,
    )


def _counted(findings: Sequence[Finding]) -> dict[str, str]:
    failures = sum(finding.is_regression for finding in findings)
    return {"tests": str(len(findings)), "failures": str(failures)}


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
