"""The front door: `python bench.py --suite coor_descent`."""

import sys

# A process that measures a single case imports this module as well, and has no command line.
if __name__ == "__main__":
    from colt5_bench.__main__ import main

    sys.exit(main())
