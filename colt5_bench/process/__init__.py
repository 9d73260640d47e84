"""State of the process that implementations share: settings, and functions that measuring depends on."""
