"""Thresholds of changes, read from suites/thresholds.toml: defaults, and rules for suites and cases."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from colt5_bench.records.results import Record
from colt5_bench.selection import SelectionError, case_filter

Direction = Literal["lower", "higher", "equal"]

DIRECTIONS = get_args(Direction)

SELECTORS = ("suite", "cases", "implementation", "device")
"""Restrictions of a rule: a name or a list of names; cases by expressions as with `-k`."""

DEVICES = ("cpu", "cuda")


class ThresholdsError(SelectionError):
    """The file of thresholds is not valid; the message names the place and what is allowed."""


@dataclass(frozen=True)
class Bound:
    """Largest change of a metric of a suite."""

    better: Direction
    """Direction in which a value is better. With `equal` any other value is worse."""

    relative: float = 0.0
    absolute: float = 0.0
    """A change counts if it is more than `absolute` and more than `relative` times the old value."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of one record. All are relative: 0.05 allows 5 % more, 0 not a byte more."""

    cold: float
    warm: float
    graph: float
    wall: float
    eager: float
    """The time columns."""

    speed_up: float
    """Speed-up over the reference: 0.25 allows the time in units of the reference's to grow by 25 %."""

    peak: float
    saved: float

    error: float
    """Largest distance from fp64: 1.0 allows twice the old distance."""

    error_share: float
    """Share of the allowed error. Errors below it count as the same."""

    registers: float
    spilled_bytes: float
    shared_bytes: float
    instructions: float
    """Static facts of each kernel, and its instructions by class."""

    metrics: Mapping[str, Bound] = field(default_factory=dict)
    """Bounds by name of the metric. For a metric without a bound, only a change between number and NaN counts."""


NUMBERS = tuple(each.name for each in fields(Thresholds) if each.name != "metrics")


@dataclass(frozen=True)
class _Rule:
    applies: Callable[[Record, str], bool]
    numbers: Mapping[str, float]
    metrics: Mapping[str, Bound]


@dataclass(frozen=True)
class Rules:
    """The thresholds of every record."""

    default: Thresholds
    rules: Sequence[_Rule] = ()
    unchecked: Sequence[str] = ()
    """Implementations that `--check` measures only if `--impl` names them."""

    def of(self, record: Record, device: str) -> Thresholds:
        """The defaults, changed by each rule that applies, in the order of the file.

        Args:
            record: one of the two compared records.
            device: `cpu` or `cuda`.
        """
        thresholds = self.default
        for rule in self.rules:
            if rule.applies(record, device):
                metrics = {**thresholds.metrics, **rule.metrics}
                thresholds = replace(thresholds, **rule.numbers, metrics=metrics)
        return thresholds


def load_rules(path: Path) -> Rules:
    """Read thresholds: a table `default` with all of them, tables `rule` with changes, and `unchecked`.

    Raises:
        ThresholdsError: the file does not exist, or is not valid.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ThresholdsError(f"cannot read the thresholds {path}: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ThresholdsError(f"{path} is not valid TOML: {error}") from error
    _only(content, ("default", "rule", "unchecked"), str(path))
    default = content.get("default", {})
    where = f"{path}, [default]"
    _only(default, (*NUMBERS, "metrics"), where)
    if missing := [name for name in NUMBERS if name not in default]:
        raise ThresholdsError(f"{where} lacks {', '.join(missing)}.")
    return Rules(
        Thresholds(**_numbers(default, where), metrics=_metrics(default, where)),
        [_rule(rule, f"{path}, [[rule]] {number}") for number, rule in enumerate(content.get("rule", []), start=1)],
        _names(content["unchecked"], f"{path}: unchecked") if "unchecked" in content else (),
    )


def _rule(content: Mapping[str, Any], where: str) -> _Rule:
    _only(content, (*SELECTORS, *NUMBERS, "metrics"), where)
    wanted = {name: _names(content[name], f"{where}: {name}") for name in SELECTORS if name in content}
    if not set(wanted.get("device", ())) <= set(DEVICES):
        raise ThresholdsError(f"{where}: device must be {' or '.join(DEVICES)}, got {content['device']!r}.")
    in_cases = case_filter(" or ".join(f"({expression})" for expression in wanted.get("cases", ())))

    def applies(record: Record, device: str) -> bool:
        return (
            record.suite in wanted.get("suite", (record.suite,))
            and record.implementation in wanted.get("implementation", (record.implementation,))
            and device in wanted.get("device", (device,))
            and in_cases(record.case)
        )

    return _Rule(applies, _numbers(content, where), _metrics(content, where))


def _names(value: Any, where: str) -> list[str]:
    """A name, or a list of names."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        raise ThresholdsError(f"{where} must be a string or a list of strings, got {value!r}.")
    return names


def _numbers(content: Mapping[str, Any], where: str) -> dict[str, float]:
    return {name: _number(content[name], f"{where}: {name}") for name in NUMBERS if name in content}


def _metrics(content: Mapping[str, Any], where: str) -> dict[str, Bound]:
    return {name: _bound(bound, f"{where}, metrics.{name}") for name, bound in content.get("metrics", {}).items()}


def _bound(content: Any, where: str) -> Bound:
    if not isinstance(content, dict) or content.get("better") not in DIRECTIONS:
        raise ThresholdsError(
            f"{where} must be a table with better = {' or '.join(map(repr, DIRECTIONS))}, got {content!r}."
        )
    _only(content, [each.name for each in fields(Bound)], where)
    numbers = {name: _number(content[name], f"{where}: {name}") for name in ("relative", "absolute") if name in content}
    return Bound(content["better"], **numbers)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ThresholdsError(f"{where} must be a finite number of at least 0, got {value!r}.")
    return float(value)


def _only(content: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    if unknown := [name for name in content if name not in allowed]:
        raise ThresholdsError(f"{where}: the key must be one of {', '.join(allowed)}, got {unknown[0]!r}.")
