"""The subcommands of the command line, a module each: `SUMMARY`, `EXAMPLES`, `configure(parser)` and `main(options)`.

`main` returns an exit status. What the user got wrong it raises, as a `SelectionError` or a `StartupError`.
"""

DONE, FAILURE, USAGE, UNMEASURED, UNDECIDED, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Exit statuses; a command may have further ones, which its help states."""
