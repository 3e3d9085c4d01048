"""Every feature of several ranks beside every other: a model that is served with both gives transformers' tokens.

    python -m tests.serving.pairs          # what has no row yet; docs/parallel_pairs.md is written from the rows
    python -m tests.serving.pairs --help

A new feature is one entry of features.FEATURES.
"""
