"""The sweep: every text-generation architecture of vLLM, shrunken and random, compiled against eager.

`python -m benchmarks.sweep --help`
"""
