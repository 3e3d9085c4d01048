"""Benchmarks: one file a row of the table, all peers of a row in one interleaved run. `python -m benchmarks --help`."""
