"""`python -m colt5_bench`, `python bench.py` and `colt5-bench`: the same, and the first to be imported."""

import signal
import sys


def main() -> int:
    """Run the command line of this process and return its exit status."""
    # Ctrl-C while all this is imported ends the process there and then; an ignored one, as of `&`, stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from colt5_bench import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
