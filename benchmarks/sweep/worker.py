"""The process that runs models of the sweep: a line of its input is an architecture, a line of its output a row."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import transformers

from benchmarks import captured
from benchmarks.devices import SETUP_ERRORS
from benchmarks.sweep import shrink

ROW = "SWEEP-ROW "
"""What a line with a result begins with; everything else on the output is chatter of libraries."""
PROMPTS = ([5, 9, 17, 100, 3], [7] * 12 + [40, 41, 42], list(range(20, 60)))
TOKENS = 16
SIZES = [1, 2, 4]


def write_checkpoint(subject: shrink.Subject, folder: str) -> tuple[str, list[list[int]]]:
    """Saves a random model of `subject`. Returns why none could be saved ("" if one was), and transformers' tokens."""
    config = shrink.configuration(subject)
    try:
        torch.manual_seed(0)
        # "eager": the attention that transformers chooses by itself leaves soft caps of the scores out
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = made.float().eval()
        made_architecture = type(model).__name__
        if made_architecture.lower() != subject.architecture.lower():
            raise TypeError(f"transformers builds {made_architecture}")
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        tied = outputs is not None and inputs.weight is outputs.weight
        for name, parameter in model.named_parameters():
            if tied and parameter is inputs.weight:  # large ones would make each token follow itself
                parameter.data.normal_(0.0, 0.3 / parameter.shape[-1] ** 0.5)
            elif parameter.dim() > 1:
                parameter.data.normal_(0.0, 2.4 / parameter.shape[-1] ** 0.5)
            elif "norm" in name.lower():
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(folder)
        model.config.architectures = [subject.architecture]  # vLLM's spelling of the name
        model.config.save_pretrained(folder)
    except (*SETUP_ERRORS, KeyError, OSError) as error:
        config.save_pretrained(folder)
        return f"{type(error).__name__}: {first_line(error)}", []
    return "", reference_tokens(model)


@torch.inference_mode()
def reference_tokens(model: transformers.PreTrainedModel) -> list[list[int]]:
    """Greedy tokens of the prompts by transformers, without a cache; none where its model does not run."""
    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(TOKENS):
            try:
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits
            except (*SETUP_ERRORS, KeyError):
                return []
            text.append(int(logits[0, -1].argmax()))
        found.append(text[len(prompt) :])
    return found


def make_known(architecture: str) -> None:
    """Loads the architecture's class here: vLLM would import itself in another process first to look at it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


@contextlib.contextmanager
def engine(folder: str, load_format: str, **changes: Any) -> Iterator[Any]:
    """An engine in this process; gone afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        load_format=load_format,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
        seed=0,
        attention_backend="CUSTOM",  # what npu has; vLLM would choose another for Gemma 4
        **changes,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        torch._dynamo.reset()
        gc.unfreeze()
        gc.collect()
        cleanup_dist_env_and_memory()


def tokens(llm: Any) -> list[list[int]]:
    """Greedy tokens of the prompts."""
    from vllm import SamplingParams, TokensPrompt

    wanted = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.0, detokenize=False)
    found = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS], wanted, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def layer_kernels(kernels: tuple[str, ...]) -> int | None:
    """Kernels from behind the first attention up to and with the second; cache writes stand for attentions where these
    run by plain operators. None without two."""
    for mark in ("Attention", "ScatterPaKv"):
        marks = [place for place, name in enumerate(kernels) if mark in name]
        if len(marks) > 1:
            return marks[1] - marks[0]
    return None


def run(subject: shrink.Subject, row: dict[str, Any]) -> None:
    """Fills the row of `subject`: `outcome` is "equal" or "different"; on the way it is the stage that is running, so
    that a failure finds it there: "not made", "eager fails" or "compiled fails"."""
    row |= {"architecture": subject.architecture, "model_type": subject.model_type, "outcome": "not made"}
    with tempfile.TemporaryDirectory() as folder:
        row["dummy_because"], reference = write_checkpoint(subject, folder)
        load_format = "dummy" if row["dummy_because"] else "auto"
        row["outcome"] = "eager fails"
        make_known(subject.architecture)
        with engine(folder, load_format, enforce_eager=True) as llm:
            wanted = tokens(llm)
        row["outcome"] = "compiled fails"
        graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
        earlier = [*captured.graphs(), *_compiled_graphs()]  # of models before; held, so that no id is given again
        with engine(folder, load_format, compilation_config=graphs) as llm:
            compiled = tokens(llm)
            row |= describe(llm, {id(one) for one in earlier})
    row["distinct_tokens"] = len({token for line in wanted for token in line})
    row["outcome"] = "equal" if compiled == wanted else "different"
    row["reason"] = _first_difference(wanted, compiled) or ("" if row["kernels"] else "no graph was captured")
    row["as_transformers"] = wanted == reference if reference else None


def describe(llm: Any, known: set[int]) -> dict[str, Any]:
    """What the compiled engine did: kernels, rules, compile time, decode steps."""
    from npu_compiler.backend import fingerprint

    graphs = [graph for graph in captured.graphs() if id(graph) not in known]
    made = captured.largest(graphs) if graphs else None
    fired: Counter[str] = Counter()
    for found in [found for found in _compiled_graphs() if id(found) not in known]:
        fired.update(entry.rule for record in found.records for entry in record.fired if entry.rule.isidentifier())
    return {
        "kernels": None if made is None else len(made.kernels),
        "layer_kernels": None if made is None else layer_kernels(made.kernels),
        "fired": dict(sorted(fired.items())),
        "compiler": fingerprint(),
        "compile_seconds": round(llm.llm_engine.vllm_config.compilation_config.compilation_time, 2),
        "decode_steps": llm.collective_rpc("report")[0]["decode_steps"],
    }


def _compiled_graphs() -> list[Any]:
    from npu_compiler.backend import CompiledGraph

    return [found for found in gc.get_objects() if type(found) is CompiledGraph]


def first_line(error: BaseException) -> str:
    """The line of an error that says most; pydantic and vLLM put a heading before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "[host runtime]" in line or line.startswith("Value error")]
    return (own or lines or ["no message"])[0][:300]


def _first_difference(wanted: list[list[int]], found: list[list[int]]) -> str:
    for prompt, (left, right) in enumerate(zip(wanted, found, strict=True)):
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            if one != other:
                return f"prompt {prompt}, token {place}: eager {one}, compiled {other}"
    return ""


def main() -> None:
    known = {subject.architecture: subject for subject in shrink.subjects()[0]}
    row: dict[str, Any] = {}

    def report_failure(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """The last thing this process does: whatever went wrong is the row of the model that was running."""
        row["reason"] = f"{kind.__name__}: {first_line(error)}"
        row["traceback"] = "".join(traceback.format_exception(kind, error, trace))[-6000:]
        print("\n" + ROW + json.dumps(row), flush=True)
        os._exit(1)  # an engine that failed half-way may never finish its own exit handlers

    sys.excepthook = report_failure
    for line in sys.stdin:
        row.clear()
        started = time.perf_counter()
        run(known[line.strip()], row)
        row["seconds"] = round(time.perf_counter() - started, 1)
        print("\n" + ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
