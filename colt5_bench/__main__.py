"""`python -m colt5_bench`, `python bench.py` and `colt5-bench`: the same, and the first to be imported."""

import sys

from colt5_bench.startup import ending_at_once


def main() -> int:
    """Run the command line of this process and return its exit status."""
    with ending_at_once():
        from colt5_bench import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
