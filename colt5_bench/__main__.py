"""`python -m colt5_bench`: the same as bench.py, for commands that start it themselves."""

import sys

from colt5_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
