"""One point of a suite to one record: what is timed, how, and whether it is right."""
