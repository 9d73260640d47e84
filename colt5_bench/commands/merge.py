"""`python bench.py merge`: join the shards of a run."""

import argparse
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.records import parts

EXAMPLES = """\
  python bench.py merge reports/layers-1 reports/layers-2 --out reports/layers.jsonl

All shards must be there, with the same suite, options, revision, versions, GPU and schema.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", type=Path, nargs="+", metavar="PART", help="results files, or directories with results, one per shard"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, ending in .jsonl")


def main(options: argparse.Namespace) -> int:
    merged = parts.merge(options.parts, options.out)
    suites = dict.fromkeys(record.suite for record in merged.records)
    print(f"merged: {len(merged.records)} records of {', '.join(suites) or 'no suite'}: {merged.path}")
    return DONE
