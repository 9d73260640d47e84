"""`python bench.py new-suite FILE`: write a working suite as a start."""

import argparse
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.selection import SelectionError

EXAMPLES = """\
  python bench.py new-suite rows.py
  python bench.py --suite rows.py
"""

EXAMPLE = Path(__file__).with_name("_example_suite.py")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a new Python file; the suite gets its name")


def main(options: argparse.Namespace) -> int:
    file: Path = options.file
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise SelectionError(
            f"the file name of a suite must be a Python name with .py, such as my_suite.py, got {file}."
        )
    with file.open("x", encoding="utf-8") as new:
        new.write(EXAMPLE.read_text(encoding="utf-8"))
    print(f"{file} is a suite that runs: python bench.py --suite {file}")
    return DONE
