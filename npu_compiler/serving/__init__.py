"""vLLM platform plugin for the device `npu`."""
