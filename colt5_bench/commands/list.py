"""`python bench.py list`: list the suites and what they measure.

PyTorch is imported only for lists of cases, so that the names of suites appear at once.
"""

import argparse
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.request import declare
from colt5_bench.selection import outlines, split_paths
from colt5_bench.startup import check, find_checkout
from colt5_bench.texts import folded

EXAMPLES = """\
  python bench.py list
  python bench.py list --suite coor_descent --preset smoke
  python bench.py list --suite all --device cpu
"""


def configure(parser: argparse.ArgumentParser) -> None:
    declare(parser.add_argument, ("suite", "preset", "device"))


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    if options.suite:
        return _list_cases(options, checkout)
    for name, description in outlines(checkout).items():
        print(folded(f"{name}: {description}"))
    print("\n`list --suite NAME` says which implementations and cases a suite has.")
    return DONE


def _list_cases(options: argparse.Namespace, checkout: Path) -> int:
    from colt5_bench.loading import choose_device, load_suites, pick_suites

    check(checkout)
    device = choose_device(options.device)
    names, paths = split_paths(options.suite)
    suites = load_suites(checkout, paths)
    for name in pick_suites(names, suites):
        suite = suites[name]
        cases = suite.cases(options.preset, device)
        print(folded(f"{name}: {suite.description}"))
        print(folded(f"    implementations: {', '.join(suite.implementations)}"))
        print(f"    {len(cases)} cases of preset {options.preset} on {device.type}:")
        for case in cases:
            print(f"        {case.id}")
    return DONE
