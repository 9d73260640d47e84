"""Commands that measure something that no suite does: figures of a document, and limits that tests hold."""
