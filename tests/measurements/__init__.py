"""Commands for figures that no suite measures: figures of a document, and limits of tests."""
