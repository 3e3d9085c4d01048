"""Dynamo graph to functional FX: aten, `vllm_ir.*`, `npu.*` and custom operators, each under its own name."""
