"""Tensor parallelism of some weights over data-parallel engines, each of which would have them whole
(docs/placements.md#weights-over-data-parallel-engines).

Engines of a mixture of experts take every step together, with as many tokens each (runner.py). So a layer may gather
the rows of all engines, multiply them with its engine's part of a weight, and send the results back. The layers are in
split_layers.py; here is over which engines a kind of weights is split, and what does not go with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed import GroupCoordinator, get_dp_group
from vllm.distributed.parallel_state import get_world_group, init_model_parallel_group
from vllm.platforms import current_platform

from npu_compiler.serving.options import FineGrainedTP, ServingOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NO_PROMPT_LOGPROBS = "npu_compiler.serving.prompt_logprobs:NoPromptLogprobs"
"""Given to vLLM where the LM head is split: the front end then refuses requests that its engine alone would need the
head for."""
_groups: dict[str, GroupCoordinator] = {}
_own: list[GroupCoordinator] = []


def settle(config: VllmConfig) -> None:
    """Checks the option against model and ranks, and has the front end refuse what the split LM head can't answer.

    Raises:
        ValueError: engines don't take their steps together, or a kind of weights is also used outside of these.
    """
    sizes = FineGrainedTP.of(ServingOptions.parse(config.additional_config).fine_grained_tp).sizes
    if not sizes:
        return
    _refuse_engines(config, sizes)
    _refuse_models(config, sizes)
    if "lm_head" in sizes:
        _refuse_lone_logits(config)
        given = config.model_config.logits_processors or []
        if NO_PROMPT_LOGPROBS not in given:
            config.model_config.logits_processors = [*given, NO_PROMPT_LOGPROBS]


def _refuse_engines(config: VllmConfig, sizes: dict[str, int]) -> None:
    model, parallel = config.model_config, config.parallel_config
    if model is None or not model.is_moe or parallel.data_parallel_size < 2:
        raise _refused(
            "it needs a mixture of experts and --data-parallel-size of at least 2, whose engines take every step "
            "together; those of a dense model don't",
            "give that, or leave fine_grained_tp out; --tensor-parallel-size splits the weights of any model",
        )
    if parallel.world_size > 1:
        raise _refused(
            f"it is for engines of one rank, and these have {parallel.world_size}, which share such weights already",
            "leave --tensor-parallel-size out, or fine_grained_tp",
        )
    if parallel.enable_elastic_ep:
        raise _refused(
            "it excludes --enable-elastic-ep: an engine that goes takes parts of weights with it",
            "leave one of the two out",
        )
    for kind, size in sizes.items():
        if parallel.data_parallel_size % size:
            raise _refused(
                f"{kind} can't be split over {size} of {parallel.data_parallel_size} engines, which leaves some over",
                f"give it a divisor of {parallel.data_parallel_size}",
            )


def _refuse_models(config: VllmConfig, sizes: dict[str, int]) -> None:
    model = config.model_config
    inside = [kind for kind in sizes if kind != "lm_head"]
    if inside and model.is_multimodal_model:
        raise _refused(
            f"{', '.join(inside)} can't be split in {model.architecture}, which takes images or sound, too: an engine "
            "encodes and embeds its own alone",
            "split lm_head only",
        )
    if "embedding" in sizes and model.enable_prompt_embeds:
        raise _refused(
            "embedding excludes --enable-prompt-embeds, with which an engine looks up its prompts' tokens alone",
            "leave one of the two out",
        )
    tied = getattr(model.hf_text_config, "tie_word_embeddings", False)
    if tied and sizes.get("lm_head") != sizes.get("embedding"):
        raise _refused(
            f"{model.architecture} has one weight for embedding and lm_head (tie_word_embeddings), which can't be "
            "split in two ways",
            "give both the same number, or leave both out",
        )


def _refuse_lone_logits(config: VllmConfig) -> None:
    model, parallel = config.model_config, config.parallel_config
    if model.runner_type == "pooling":
        raise _refused(f"{model.architecture} pools, which takes no lm_head", "leave lm_head out")
    if parallel.distributed_executor_backend == "external_launcher":
        raise _refused(
            "lm_head excludes --distributed-executor-backend external_launcher: an engine without tokens then takes "
            "part in a step unseen, and would not come to the LM head",
            "leave the backend out, and vLLM starts the engines",
        )


def _refused(what: str, fix: str) -> ValueError:
    return ValueError(f"additional_config: fine_grained_tp: {what}; {fix}")


def make_groups(config: VllmConfig) -> None:
    """Makes the groups of engines that weights are split over. All ranks of all engines call it, behind vLLM's own
    groups. Kinds that are split over as many engines share a group, and that of all engines is vLLM's."""
    sizes = FineGrainedTP.of(ServingOptions.of(config).fine_grained_tp).sizes
    engines = config.parallel_config.data_parallel_size
    made = {engines: get_dp_group()} if sizes else {}
    for size in sorted(set(sizes.values()) - {engines}):
        world = get_world_group()
        ranks = [list(range(first, first + size)) for first in range(0, engines, size)]
        backend = current_platform.dist_backend
        made[size] = init_model_parallel_group(ranks, world.local_rank, backend, group_name=f"fine{size}")
        _own.append(made[size])
    _groups.clear()
    _groups.update({kind: made[size] for kind, size in sizes.items()})


def destroy_groups() -> None:
    """Lets the groups go; before vLLM's own."""
    _groups.clear()
    while _own:
        _own.pop().destroy()


def group_of(kind: str) -> GroupCoordinator | None:
    """The engines that weights of a kind are split over; None: each has them whole.

    Args:
        kind: a field of FineGrainedTP.
    """
    return _groups.get(kind)
