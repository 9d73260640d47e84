"""Output of records: terminal, plots, page, and tables for other programs."""
