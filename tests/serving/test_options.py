"""Unknown, malformed and contradictory options are refused with what to write instead."""

import pytest
import torch

from npu_compiler.serving.options import ServingOptions


def test_defaults() -> None:
    options = ServingOptions.parse({})
    assert (options.report_path, options.report_interval, options.compile) == (None, 10.0, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"report_pth": "x"}, "unknown option 'report_pth'; did you mean 'report_path'"),
        ({"interval": 3}, "unknown option 'interval'; did you mean 'report_interval'"),
        ({"report_path": 3}, "report_path must be a file name, got 3"),
        ({"report_interval": -1}, "report_interval must be seconds >= 0, got -1"),
        ({"report_interval": "often"}, "report_interval must be seconds >= 0, got 'often'"),
        ({"report_interval": True}, "report_interval must be seconds"),
        ({"capture_budget_mib": -1}, "capture_budget_mib must be a number >= 0, got -1"),
        ({"capture_budget_seconds": "short"}, "capture_budget_seconds must be a number >= 0, got 'short'"),
        ({"compile": ["fast"]}, "compile must be a JSON object"),
        (["report_path"], "expected a JSON object, got list"),
        ({"compile": {"disable_passes": []}}, "(?s)compile: unknown option 'disable_passes'.*disabled_passes"),
        (
            {"compile": {"capture_limit": 3}},
            "capture_limit describe captures of torch.compile's backend",
        ),
        ({"compile": {"disabled_passes": ["swigloo"]}}, "(?s)disabled_passes.*swigloo.*swiglu"),
        ({"compile": {"rules": ["no_such_module:RULE"]}}, "(?s)no_such_module"),
        ({"report_interval": 3}, "report_interval does nothing without report_path"),
        ({"trace_steps": [1, 2]}, "trace_steps does nothing without trace_dir"),
    ],
)
def test_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions.parse(given)


@pytest.mark.parametrize("name", ["sequence_parallel", "attention_exchange", "shared_expert_rows"])
def test_rows_in_parts_where_a_range_has_as_many_tokens(name: str) -> None:
    from vllm.config.utils import Range

    from npu_compiler.config import Options
    from npu_compiler.serving.compiler import for_range

    def chosen(rows: int) -> list[int]:
        ranges = (Range(1, 999), Range(1000, 8192))
        return [getattr(for_range(Options(**{name: rows}), tokens), name) for tokens in ranges]

    assert [chosen(rows) for rows in (1000, 1, 0)] == [[0, 1], [1, 1], [0, 0]]


def test_halves_where_a_range_has_two_tokens_or_more() -> None:
    from vllm.config.utils import Range

    from npu_compiler.config import Options
    from npu_compiler.serving.compiler import for_range

    ranges = (Range(1, 1), Range(1, 999), Range(2, 999), Range(1000, 8192))
    for rows, expected in ((2, [0, 0, 2, 2]), (1000, [0, 0, 0, 2]), (0, [0, 0, 0, 0])):
        assert [for_range(Options(dual_batch_overlap=rows), one).dual_batch_overlap for one in ranges] == expected


def test_equal_pieces_are_compiled_once_where_their_options_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the earlier result at a key it knows; the ranges of tokens of one piece are one graph."""
    from torch import fx
    from torch._functorch._aot_autograd import autograd_cache
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from vllm.config.utils import Range

    from npu_compiler.config import Options
    from npu_compiler.serving.compiler import for_range, tell_vllm_the_key

    graph = fx.symbolic_trace(lambda x: torch.relu(x))
    keys: list[str] = []
    ask = autograd_cache.autograd_cache_key
    monkeypatch.setattr(autograd_cache, "autograd_cache_key", lambda *args: keys.append(ask(*args)[0]))
    options = Options(sequence_parallel=1000, expert_tokens=8192)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        for tokens in (Range(1, 999), Range(1, 999), Range(1000, 8192)):
            tell_vllm_the_key(graph, [mode.from_tensor(torch.rand(2, 2))], for_range(options, tokens))
    first, again, more = keys
    assert first == again != more
