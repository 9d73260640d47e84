"""Results that belong together: an interrupted run and its completion, and the shards of a run."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from colt5_bench.records import provenance
from colt5_bench.records.environment import flat
from colt5_bench.records.results import Group, Record, Run, Writer, load, write
from colt5_bench.selection import SelectionError, Shard

COMPARED = (
    *("python", "threads", "torch", "triton", "cuda", "packages", "gpu", "options", "data"),
    *("git", "harness", "guests", "suite_file"),
)
"""Conditions that have to be equal for records in one table. The clock of a GPU at the start may differ."""

COMPARED_ON_CPU = (*COMPARED, "cpu", "cores")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], *, but: Collection[str] = ()) -> str:
    """Differences, or possible differences, of two environments that have to be equal, in words. Empty if there are
    none."""
    compared = COMPARED if one.get("gpu") and other.get("gpu") else COMPARED_ON_CPU
    ones, others = flat(dict(one)), flat(dict(other))
    unequal = [
        f"{name} {ones.get(name)!r} and {others.get(name)!r}"
        for name in dict.fromkeys([*ones, *others])
        if name.split(".")[0] in compared
        and not name.startswith("gpu.at_start")
        and name not in but
        and ones.get(name) != others.get(name)
    ]
    return ", ".join(unequal) or _doubts(one, other)


def _doubts(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Reasons why the code of both may differ, even if their descriptions are equal."""
    of_code = [one.get("git"), other.get("git"), *filter(None, (one.get("harness"), other.get("harness")))]
    doubts = filter(None, map(provenance.doubt, of_code))
    return "; ".join(dict.fromkeys(f"their code, perhaps, because a revision is unknown: {why}" for why in doubts))


def keep_finished(
    writer: Writer, environment: Mapping[str, Any], expected: Mapping[Group, Collection[str]]
) -> list[Record]:
    """The records of an interrupted run that need not be measured again. All others are removed from the file.

    Implementations that are measured together are kept together, if all were recorded and none ended with an error,
    which may be an error of the machine. A wrong result or a lack of memory is a result.

    Raises:
        SelectionError: the run was measured under other conditions than `environment`, or cannot be read.
    """
    run = read(writer.path)
    for before in run.environments.values():
        if found := differences(before, environment):
            raise SelectionError(
                f"{writer.path} cannot be completed, because that run and this one differ in {found}: start a new run "
                "with another --out."
            )
    groups: dict[Group, dict[str, str]] = {}
    for record in run.records:
        groups.setdefault(record.group, {})[record.implementation] = record.status
    finished = {
        group
        for group, statuses in groups.items()
        if set(expected.get(group, ())) <= set(statuses) and "error" not in statuses.values()
    }
    kept = [record for record in run.records if record.group in finished]
    writer.rewrite(run.environments.values(), kept)
    return kept


def read(path: Path) -> Run:
    """The run at a path given by the user."""
    try:
        return load(path)
    except ValueError as error:
        raise SelectionError(str(error)) from error


def merge(paths: Sequence[Path], out: Path) -> Run:
    """Join the shards of a run, in the order of a whole run. Each is a results file or a directory with results files.

    Raises:
        SelectionError: they belong to different runs, overlap, or lack records; nothing is written.
    """
    if out.exists():
        raise SelectionError(f"--out must be a new file, but {out} exists.")
    parts = [read(file) for path in paths for file in sorted(path.rglob("*.jsonl")) or [path]]
    first = _environment(parts[0])
    by_suite: dict[str, dict[Shard, Run]] = {}
    for part in parts:
        environment = _environment(part)
        for other in part.environments.values():
            if other is not first and (found := differences(first, other, but=("options.suite", "options.shard"))):
                raise SelectionError(
                    f"{parts[0].path} and {part.path} do not belong to one run: they differ in {found}."
                )
        if number := missing(part):
            raise SelectionError(f"{part.path} lacks {number} of its records: complete it with `run --resume`.")
        shards = by_suite.setdefault(environment["options"]["suite"], {})
        shard = Shard.parse(environment["options"]["shard"])
        if shard in shards:
            raise SelectionError(
                f"{part.path} and {shards[shard].path} both contain shard {shard}: name only one of them."
            )
        shards[shard] = part
    merged = Run(out)
    for suite, shards in by_suite.items():
        _check_complete(suite, shards)
        _refuse_twice(shards.values())
        for part in shards.values():
            merged.environments.update(part.environments)
        merged.records += _in_turn([shards[shard].records for shard in sorted(shards, key=lambda each: each.index)])
    write(out, merged.environments.values(), merged.records)
    return merged


def missing(run: Run) -> int:
    """Number of expected records that a run lacks."""
    # By suite: a run that was completed has two environments, and each expects all.
    described: Iterable[Any] = filter(_is_described, run.environments.values())
    expected: dict[str, int] = {each["options"]["suite"]: each["expected"] for each in described}
    recorded = Counter(suite for suite, *_ in {record.key for record in run.records})
    return sum(max(number - recorded[suite], 0) for suite, number in expected.items())


def _is_described(environment: Mapping[str, Any]) -> bool:
    """True if an environment has what the run was to measure. Old files lack this."""
    return "suite" in environment.get("options", {}) and "expected" in environment


def _refuse_twice(parts: Iterable[Run]) -> None:
    recorded: dict[tuple[str, str, str, str], Path] = {}
    for part in parts:
        for record in part.records:
            if record.key in recorded:
                where = " and ".join(dict.fromkeys(map(str, (recorded[record.key], part.path))))
                raise SelectionError(f"{where} contain {' '.join(record.key)} twice: measure these results again.")
            recorded[record.key] = part.path


def _environment(part: Run) -> dict[str, Any]:
    """Environment of a part. The environments of a completed run were compared before."""
    environment: dict[str, Any] = next(iter(part.environments.values()), {})
    if not _is_described(environment) or "shard" not in environment["options"]:
        raise SelectionError(f"{part.path} does not name the options of its run: measure it again.")
    return environment


def _check_complete(suite: str, shards: Mapping[Shard, Run]) -> None:
    counts = {shard.count for shard in shards}
    if len(counts) > 1:
        divisions = " and into ".join(map(str, sorted(counts)))
        raise SelectionError(f"suite {suite} was divided into {divisions} shards: name only shards of one division.")
    whole = [Shard(index + 1, count) for count in counts for index in range(count)]
    if missing := [str(shard) for shard in whole if shard not in shards]:
        raise SelectionError(f"suite {suite} lacks shard {' and '.join(missing)}: name the results of all shards.")


def _in_turn(shards: Sequence[Iterable[Record]]) -> list[Record]:
    """The cases of the shards, in the order before the division."""
    cases = [[list(records) for _, records in groupby(shard, key=lambda record: record.case)] for shard in shards]
    rounds = range(max(map(len, cases), default=0))
    return [record for turn in rounds for each in cases for record in (each[turn] if turn < len(each) else ())]
