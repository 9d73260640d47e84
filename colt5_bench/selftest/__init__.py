"""Checks of the harness itself, on this machine."""
