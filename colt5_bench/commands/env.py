"""`python bench.py env`: what a run here would be measured under."""

import argparse
import json

from colt5_bench import environment
from colt5_bench.commands import DONE
from colt5_bench.selection import choose_device

SUMMARY = "show what a run here would be measured under, for a report of a problem"
EXAMPLES = """\
  python bench.py env
  python bench.py env --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>")
    parser.add_argument("--json", action="store_true", help="as results files hold it")


def main(options: argparse.Namespace) -> int:
    described = environment.describe(choose_device(options.device))
    if options.json:
        print(json.dumps(described, indent=2))
        return DONE
    for name, value in environment.flat(described).items():
        print(f"{name:28} {'-' if value is None else value}")
    return DONE
