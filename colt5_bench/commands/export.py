"""`python bench.py export RUN --format NAME`: write a run for another tool."""

import argparse
import sys
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.commands.report import load_views
from colt5_bench.files import atomic_write
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.records.parts import read
from colt5_bench.report.exchange import FORMATS, export

EXAMPLES = """\
  python bench.py export reports/after --format pytest-benchmark --out after.json
  python bench.py export reports/after --format github-action-benchmark --out output.json
  python bench.py export reports/after --format bencher | bencher run --adapter json --file /dev/stdin
  python bench.py export reports/after --format flashinfer-bench --out traces.jsonl
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a results file, or a directory with results, of one run")
    parser.add_argument("--format", choices=FORMATS, required=True, help="the tool that reads the file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: the standard output)")


@no_garbage_collection()
def main(options: argparse.Namespace) -> int:
    exported = export(read(options.run), options.format, load_views())
    if options.out is None:
        sys.stdout.write(exported.decode())
        return DONE
    with atomic_write(options.out) as unfinished:
        unfinished.write_bytes(exported)
    print(options.out)
    return DONE
