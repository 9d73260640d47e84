"""A comparison as text, as JSON, as Markdown for a pull request, and as test results."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from colt5_bench.compare.findings import Comparison, Finding
from colt5_bench.records.derived import group_by
from colt5_bench.report.rows import json_value
from colt5_bench.report.terminal import Column, Group, print_table

FORMATS = ("text", "json", "markdown", "junit")

STYLES = {"failed": "red", "missing": "red", "worse": "red", "unclear": "yellow", "new": "dim", "better": "green"}

COLUMNS = (
    Column[Finding]("verdict", lambda finding: finding.verdict, number=False),
    Column[Finding]("metric", lambda finding: finding.metric, number=False),
    Column[Finding]("baseline", lambda finding: finding.baseline_text, 3),
    Column[Finding]("now", lambda finding: finding.now_text, 2),
    Column[Finding]("change", lambda finding: finding.change, 1),
)

MOST_ROWS = 100
"""Most rows of the table for a pull request, because GitHub limits comments. Regressions come first."""


def write(comparison: Comparison, form: str) -> None:
    """Print a comparison in one of `FORMATS`."""
    if form == "text":
        show(comparison, Console())
    else:
        print({"json": as_json, "markdown": as_markdown, "junit": as_junit}[form](comparison))


def show(comparison: Comparison, console: Console) -> None:
    """Print a table of changes for each suite, then notes, then the number of each verdict."""
    for findings in group_by(comparison.notable(), lambda finding: finding.suite):
        groups = [Group(heading, list(rows)) for heading, rows in groupby(findings, _about)]
        print_table(
            findings[0].suite,
            COLUMNS,
            groups,
            console,
            style=lambda finding: STYLES[finding.verdict],
            remark=_remark,
            elsewhere=", and so does --format json",
        )
    for note in (*comparison.notes, *comparison.summary_lines()):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"against the baseline: {comparison.counts}", highlight=False, soft_wrap=True)


def as_json(comparison: Comparison) -> str:
    """All findings, with NaN and infinities as strings, which JSON lacks."""
    findings = [
        {**asdict(finding), "baseline": json_value(finding.baseline), "now": json_value(finding.now)}
        for finding in comparison.findings
    ]
    counts = {"regressions": len(comparison.regressions), "undecided": len(comparison.undecided)}
    content = {**counts, "notes": list(comparison.notes), "findings": findings}
    return json.dumps(content, indent=2, allow_nan=False)


def as_markdown(comparison: Comparison) -> str:
    """A heading, notes and a table of changes."""
    count = len(comparison.regressions)
    verdict = f"{count} regression{'s' if count > 1 else ''}" if count else "No regression"
    verdict = "Undecided" if comparison.undecided and not count else verdict
    lines = [f"### {verdict} against the baseline", "", comparison.counts, ""]
    lines += [f"- {_escaped(note)}" for note in (*comparison.notes, *comparison.summary_lines())]
    shown = comparison.notable()
    if shown:
        verdict, *titles = (column.title for column in COLUMNS)
        headers = (verdict, "suite", "case", *titles, "note")
        lines += ["", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for finding in shown[:MOST_ROWS]:
        verdict, *figures = (column.cell(finding) for column in COLUMNS)
        verdict = f"**{verdict}**" if finding.is_regression else verdict
        cells = (verdict, finding.suite, _about(finding), *figures, _remark(finding))
        lines.append(f"| {' | '.join(map(_escaped, cells))} |")
    if len(shown) > MOST_ROWS:
        lines += ["", f"and {len(shown) - MOST_ROWS:,} more"]
    return "\n".join(lines) + "\n"


def as_junit(comparison: Comparison) -> str:
    """A test for each finding, which fails if it is a regression."""
    root = ElementTree.Element("testsuites", {"name": "colt5-bench", **_counted(comparison.findings)})
    for findings in group_by(comparison.findings, lambda finding: finding.suite):
        suite = ElementTree.SubElement(root, "testsuite", {"name": findings[0].suite, **_counted(findings)})
        for finding in findings:
            test = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{finding.suite}.{finding.implementation}",
                name=f"{finding.case} {finding.direction} {finding.metric}",
            )
            line = f"{finding.verdict}: {finding.baseline_text} -> {finding.now_text} {finding.change}".rstrip()
            if finding.is_regression:
                ElementTree.SubElement(test, "failure", message=line, type=finding.verdict).text = finding.note
            elif finding.verdict != "same":
                ElementTree.SubElement(test, "system-out").text = line
        if comparison.notes:
            ElementTree.SubElement(suite, "system-out").text = "\n".join(comparison.notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def append_summary(comparison: Comparison) -> None:
    """Append to the summary of the job, in GitHub Actions."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as summary:
            summary.write(as_markdown(comparison))


def _about(finding: Finding) -> str:
    """The case, its direction and the implementation of a finding."""
    case = finding.case if finding.label is None else finding.label
    return " ".join(filter(None, (case, finding.direction, finding.implementation)))


def _remark(finding: Finding) -> str:
    """The interval of a change, and the note."""
    seen = finding.interval_text if finding.interval_text != finding.change else ""
    return "; ".join(filter(None, (f"95 % interval {seen}" if seen else "", finding.note)))


def _counted(findings: Sequence[Finding]) -> dict[str, str]:
    failures = sum(finding.is_regression for finding in findings)
    return {"tests": str(len(findings)), "failures": str(failures)}


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
