"""`python bench.py list`: which suites there are, and what they measure."""

import argparse
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.selection import choose_device, load_suites, pick
from colt5_bench.startup import check, find_checkout
from colt5_bench.suite import PRESETS

SUMMARY = "say which suites there are, and what they measure"
EXAMPLES = """\
  python bench.py list
  python bench.py list --device cpu
  python bench.py list --suite coor_descent --preset smoke
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="the cases of this, one a line")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="of which these are; default %(default)s")
    parser.add_argument("--device", default="auto", help="count the cases of this: auto, cpu, cuda or cuda:<index>")


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    device = choose_device(options.device)
    suites = load_suites(checkout)
    if options.suite:
        for name in dict.fromkeys(options.suite):
            for case in suites[pick("suite", name, suites)].cases(options.preset, device):
                print(case.id)
        return DONE
    for suite in suites.values():
        counts = ", ".join(f"{len(suite.cases(preset, device))} {preset}" for preset in PRESETS)
        print(f"{suite.name}: {suite.description}")
        print(f"    cases on {device.type}: {counts}")
        print(f"    implementations: {', '.join(suite.implementations)}")
    return DONE
