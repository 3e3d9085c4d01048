"""Unknown, malformed and contradictory options are refused with what to write instead."""

import pytest

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
        ({"compile": {"capture_limit": 3}}, "(?s)compile: capture=False contradicts capture_limit"),
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
