"""Profilers for the calls of a run."""
