"""The subcommands of the command line, a module each: `EXAMPLES`, `configure(parser)` and `main(options)`.

`main` returns an exit status. What the user got wrong it raises, as a `SelectionError` or a `StartupError`.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from colt5_bench.texts import describe_error

T = TypeVar("T")

DONE, FAILURE, USAGE, UNMEASURED, UNDECIDED, INTERRUPTED, CLOSED = 0, 1, 2, 3, 4, 130, 141
"""Exit statuses; a command may have further ones, which its help states. Whatever fails otherwise ends with 3, and what
nobody reads any more with 141."""


def attempt(what: str, make: Callable[[], T]) -> T | None:
    """Make a product of results, or return None. The results, and their other products, are worth more than one that
    fails."""
    try:
        return make()
    except Exception as error:
        print(f"{what}: {describe_error(error)}", file=sys.stderr)
        return None
