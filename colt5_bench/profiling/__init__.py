"""Profilers around the calls that a run would measure."""
