"""The `ascend` backend of torch.compile, the vLLM plugin built on it, and CANN's C interface for the host CPU."""

__version__ = "0.1.0"
