"""`python bench.py env`: what a run here would be measured under."""

import argparse
import json

from colt5_bench import environment
from colt5_bench.commands import DONE
from colt5_bench.loading import choose_device
from colt5_bench.request import declare

EXAMPLES = """\
  python bench.py env
  python bench.py env --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    declare(parser.add_argument, ("device",))
    parser.add_argument("--json", action="store_true", help="as results files hold it")


def main(options: argparse.Namespace) -> int:
    described = environment.describe(choose_device(options.device))
    if options.json:
        print(json.dumps(described, indent=2))
        return DONE
    for name, value in environment.flat(described).items():
        print(f"{name:28} {'-' if value is None else value}")
    return DONE
