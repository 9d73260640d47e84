"""`python bench.py env`: print the environment of a run on this machine."""

import argparse
import json
import sys
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.loading import choose_device
from colt5_bench.records import environment
from colt5_bench.records.provenance import Origin
from colt5_bench.request import declare

EXAMPLES = """\
  python bench.py env
  python bench.py env --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    declare(parser.add_argument, ("device",))
    parser.add_argument("--json", action="store_true", help="print the environment as in results files")


def main(options: argparse.Namespace) -> int:
    origin = Origin.of(Path.cwd() / "suites" / "__init__.py")
    for note in origin.notes():
        print(note, file=sys.stderr)
    described = {**environment.describe(choose_device(options.device)), **origin.described}
    if options.json:
        print(json.dumps(described, indent=2))
        return DONE
    for name, value in environment.flat(described).items():
        print(f"{name:28} {'-' if value is None else value}")
    return DONE
