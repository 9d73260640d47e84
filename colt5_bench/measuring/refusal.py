"""The error for an implementation that is refused."""


class RefusedError(Exception):
    """Times of an implementation are meaningless; the message names the reason."""
