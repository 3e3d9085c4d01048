"""Small Hugging Face-format models for the tests, the benchmarks and the demo."""
