"""The subcommands, one module each, with `EXAMPLES`, `configure(parser)` and `main(options)`.

`main` returns an exit status. For wrong usage it raises a `SelectionError` or a `StartupError`.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from colt5_bench.texts import describe_error

T = TypeVar("T")

DONE, FAILURE, USAGE, UNMEASURED, UNDECIDED, INTERRUPTED, CLOSED = 0, 1, 2, 3, 4, 130, 141
"""Exit statuses. The help of a command states further ones. Other failures end with 3, and a closed output with 141.
"""


def attempt(what: str, make: Callable[[], T]) -> T | None:
    """Make an output file of results, or return None after an error, which must not affect results and other files."""
    try:
        return make()
    except Exception as error:
        print(f"{what}: {describe_error(error)}", file=sys.stderr)
        return None
