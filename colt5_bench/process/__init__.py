"""State of the process that all implementations share: settings, and the functions that measuring relies on."""
