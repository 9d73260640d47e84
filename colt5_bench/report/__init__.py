"""Records for people: terminal, plots, page and tables for other programs."""
