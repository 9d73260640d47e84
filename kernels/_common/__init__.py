"""Parts that operations share."""
