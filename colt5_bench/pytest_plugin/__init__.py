"""Suites as files of pytest and pytest-benchmark."""
