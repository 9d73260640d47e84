"""`python -m colt5_bench`, `python bench.py` and `colt5-bench`: the same, and the first to be imported."""

import gc
import sys

from colt5_bench.startup import ending_at_once


def main() -> int:
    """Run the command line of this process and return its exit status."""
    with ending_at_once():
        from colt5_bench import cli
    status = cli.main()
    # Python looks at all that there is as it ends. It takes half a second, and everything goes in any case.
    gc.freeze()
    return status


if __name__ == "__main__":
    sys.exit(main())
