"""The front door: `python bench.py --suite coor_descent`."""

import sys

from colt5_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
