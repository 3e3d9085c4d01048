"""The pass pipeline: one pass, one file."""
