"""The error of an implementation that is refused."""


class RefusedError(Exception):
    """The times of an implementation say nothing about it: the message says what was noticed, and where."""
