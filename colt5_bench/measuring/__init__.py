"""From a point of a suite to its records: accuracy, memory and times."""
