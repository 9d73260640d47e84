"""The harness of colt5-bench: timing, memory, accuracy, records and reports. It has no code for specific operators."""
