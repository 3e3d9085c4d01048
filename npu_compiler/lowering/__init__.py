"""Dynamo graph to functional FX: aten, `vllm_ir.*`, `npu.*` and custom operators, each kept whole under its own name."""
