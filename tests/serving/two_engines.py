"""Data-parallel engines behind one front, and what is done with them, step by step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

from tests.serving.engine import SETTINGS

Tokens = list[list[int]]


class Engines:
    """What a test asks engines for."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._requests = 0

    async def answers(self, prompts: Tokens, counts: Sequence[int], engine: int | None = None) -> Tokens:
        """Greedy tokens of prompts that are asked all at once, of one engine or of all."""
        return list(await asyncio.gather(*(self._one(*asked, engine) for asked in zip(prompts, counts, strict=True))))

    async def _one(self, prompt: list[int], count: int, engine: int | None) -> list[int]:
        sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0)
        return await self.ask(prompt, sampling, engine)

    async def ask(self, prompt: list[int], sampling: SamplingParams, engine: int | None = None) -> list[int]:
        """The tokens of one request."""
        self._requests += 1
        asked = TokensPrompt(prompt_token_ids=prompt)
        outputs = self._llm.generate(asked, sampling, str(self._requests), data_parallel_rank=engine)
        *_, last = [output async for output in outputs]
        return list(last.outputs[0].token_ids)

    async def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function in the process of every rank: with its worker, and `arguments`."""
        await self._llm.collective_rpc(function, args=arguments)

    async def reports(self, folder: Path) -> list[dict[str, Any]]:
        """The run report of every engine, in order; written to files of `folder`, as vLLM hands on one answer."""
        await self.call(_write_report, str(folder))
        return [json.loads(file.read_text()) for file in sorted(folder.glob("report.*.json"))]


def _write_report(worker: Any, folder: str) -> None:
    """Of a rank's process."""
    rank = worker.parallel_config.data_parallel_rank
    Path(folder, f"report.{rank}.json").write_text(json.dumps(worker.report()))


def served(folder: Path, asks: Callable[[Engines], Awaitable[None]], **settings: Any) -> None:
    """Starts engines with SETTINGS and `settings`, and does `asks` with them. Needs `start.ENVIRONMENT`."""

    async def run() -> None:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **(SETTINGS | settings)))
        try:
            await asks(Engines(llm))
        finally:
            llm.shutdown(timeout=60)

    asyncio.run(run())
