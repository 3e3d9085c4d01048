"""What start-up says to a pair: every pair's configuration is made, no engine is started."""

from __future__ import annotations

import json
import sys

from vllm.engine.arg_utils import EngineArgs

from tests.serving import engine
from tests.serving.pairs import texts
from tests.serving.pairs.plan import Pair, Start, pairs


def message(start: Start) -> str:
    """What a start is refused with, in one line; empty if it is accepted."""
    settings = engine.SETTINGS | start.settings()
    try:
        EngineArgs(model=str(texts.folder(start.kind, start.layers, start.hidden)), **settings).create_engine_config()
    except ValueError as error:
        errors = getattr(error, "errors", None)  # pydantic's, around the platform's own
        text = str(errors()[0]["msg"]) if errors else str(error)
        return " ".join(text.removeprefix("Value error, ").split())
    return ""


def said() -> dict[Pair, str]:
    """The pairs that start-up refuses, with its words."""
    return {pair: text for pair in pairs() if (text := message(pair.start))}


if __name__ == "__main__":
    from npu_compiler.backend import fingerprint

    found = [[pair.kind, pair.left, pair.right, text] for pair, text in said().items()]
    sys.stdout.write("\n" + json.dumps([found, fingerprint()]))
