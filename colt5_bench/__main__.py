"""Entry of `python -m colt5_bench`, `python bench.py` and `colt5-bench`; it is imported first."""

import gc
import sys

from colt5_bench.startup import ending_at_once


def main() -> int:
    """Run the command line of this process and return its exit status."""
    with ending_at_once():
        from colt5_bench import cli
    status = cli.main()
    # At its exit, Python would collect garbage for half a second, although the process ends anyway.
    gc.freeze()
    return status


if __name__ == "__main__":
    sys.exit(main())
