"""bfloat16 and float16 serving stays close to float32 transformers on the same weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch_npu
from torch import nn
from vllm import SamplingParams, TokensPrompt

from tests.models import checkpoints
from tests.serving import oracle
from tests.serving.engine import engine, graphs

# Largest and mean distance of log-probabilities over all prompt positions and the whole vocabulary. transformers itself
# is 0.35 and 0.036 off in bfloat16, 0.032 and 0.0042 in float16.
TOLERANCE = {"bfloat16": (0.5, 0.06), "float16": (0.08, 0.01)}


def layouts(model: nn.Module) -> Counter[int]:
    """How many of the layers' matrices lie in each of CANN's formats."""
    return Counter(int(torch_npu.get_npu_format(item)) for name, item in model.named_parameters() if "_proj" in name)


@pytest.mark.parametrize(("dtype", "weight_nz"), [("bfloat16", "off"), ("float16", "off"), ("bfloat16", "all")])
def test_log_probabilities(dtype: str, weight_nz: str) -> None:
    shape = checkpoints.Shape(family="qwen3", dtype=dtype)
    folder = checkpoints.cached(shape)
    prompt = oracle.prompts()[3]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=shape.vocab)
    options = {"compile": {"weight_nz": weight_nz}}
    settings = {"dtype": dtype, "max_logprobs": shape.vocab, **graphs("FULL_DECODE_ONLY")}
    with engine(folder, additional_config=options, **settings) as llm:
        out = llm.generate(TokensPrompt(prompt_token_ids=prompt), sampling, use_tqdm=False)[0]
        (found,) = llm.apply_model(layouts)
    assert found == {2 if weight_nz == "off" else 29: 4 * shape.layers}
    served = torch.tensor([[row[token].logprob for token in range(shape.vocab)] for row in out.prompt_logprobs[1:]])
    distance = (served.double() - oracle.log_probabilities(folder, prompt)[:-1]).abs()
    largest, mean = TOLERANCE[dtype]
    assert float(distance.max()) < largest
    assert float(distance.mean()) < mean
