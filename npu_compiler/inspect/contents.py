"""What a bundle holds besides programs, as data that is checked when it is read.

A bundle is what one process left behind, a folder or a zip of it:

    bundle.json                 Header: format, environment
    run.json                    Run: serving's run report (run.py)
    captures.jsonl              ModelCapture, a line each: what vLLM captured (run.py)
    GRAPH/graph.json            Graph: its options, the passes and their rules, in order
    GRAPH/stages.jsonl          Stage, a line each: what a pass did, and which program it left
    GRAPH/NN_STAGE.json, .py    the programs (program.py, python_text.py), each once
    GRAPH/constants.safetensors small constants of the programs
    GRAPH/plan.json             Plan: order, memory, providers, constants, cache
    GRAPH/captures.jsonl        Captured, a line each
    GRAPH/calls.json            Calls, when the compiled graph is gone: replays and other calls (run.py)
    GRAPH/inputs.safetensors    the first call's inputs, if asked for, and inputs.json: the numbers among them
    GRAPH/surroundings.json     Surroundings: what the calls need besides arguments; of the step whose inputs are kept,
                                only if they are. surroundings.safetensors: contents of memory, likewise

Each file is written when its content is known, so that a crash leaves what came before it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints

from npu_compiler.inspect.names import Device, Dotted, Name, TorchName
from npu_compiler.inspect.program import Data

FORMAT: Literal[1] = 1
HEADER, GRAPH, STAGES, PLAN, CAPTURES = "bundle.json", "graph.json", "stages.jsonl", "plan.json", "captures.jsonl"
INPUTS, NUMBERS = "inputs.safetensors", "inputs.json"
FINAL, FAILED = "final", "failed"
"""The stage behind all that was done to a graph, and the one with the error that ended a compilation."""
SURROUNDINGS, MEMORY = "surroundings.json", "surroundings.safetensors"
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]*$")]
"""A file in the graph's folder, without its ending: nothing that leads out of it."""


class Environment(Data):
    """Where a bundle was made.

    Attributes:
        versions: of the packages that decide what is compiled.
        platform: operating system, machine and CPUs.
        cann: which CANN is used, and why.
        device: the device's name.
        variables: the environment variables of this project; others may be secrets and are not kept.
    """

    versions: dict[str, str]
    platform: str
    cann: str
    device: str
    rank: int = 0
    ranks: int = 1
    variables: dict[str, str] = Field(default_factory=dict)


class Header(Data):
    """The first file of a bundle.

    Attributes:
        started: seconds since the epoch.
    """

    format: Literal[1]
    environment: Environment
    started: float


class RuleInfo(Data):
    """A rule of a pass.

    Attributes:
        roots: operators at which its pattern ends. `calls`: how many calls the pattern has in its longest form.
        file, line: where the rule's reference, which shows what it looks for, is written.
    """

    name: str
    roots: tuple[str, ...]
    calls: int
    disabled: bool = False
    file: str = ""
    line: int = 0


class PassInfo(Data):
    """A pass: why it stands where it stands, and its rules."""

    name: str
    place: str
    rules: tuple[RuleInfo, ...] = ()


class Graph(Data):
    """A graph that was compiled.

    Attributes:
        options: all of them, as Python values in text.
        given: the names of those that were not left at their defaults.
        passes: in their order; those that are left out are not among them.
        inputs: the names of the inputs in the user's model, where they are known.
        compile_id: Dynamo's number of the compilation, as in torch's logs: "0/1" is the second one of the first frame.
    """

    format: Literal[1]
    name: str
    started: float
    options: dict[str, str]
    given: tuple[str, ...] = ()
    passes: tuple[PassInfo, ...] = ()
    inputs: tuple[str, ...] = ()
    compile_id: str = ""


class Fire(Data):
    """A rewrite that was made: the rule, the place in the user's model, the calls that went and those that came, and
    what that saves at every run."""

    rule: str
    place: str
    nodes: tuple[str, ...]
    made: tuple[str, ...] = ()
    kernels: int | None = None
    bytes: str = ""
    layers: int = 1


class Refusal(Data):
    """A rewrite that was considered and left out, and why."""

    rule: str
    place: str
    reason: str
    layers: int = 1


class Attempt(Data):
    """A call at which a rule was tried in vain (passes.record.Attempt)."""

    rule: str
    anchor: str
    place: str
    matched: int
    reason: str
    stopper: str = ""
    stopper_place: str = ""
    whole: bool = False


class Asked(Data):
    """A question about symbolic sizes: the answer, and the proof or why there is none."""

    answer: Literal["true", "false", "unknown"]
    text: str
    times: int = 1


class Stage(Data):
    """A line of `stages.jsonl`.

    Attributes:
        program: the file with the program at this stage, without its ending; that of an earlier stage if it is equal.
        calls: how many calls the program has. A program of a few equal layers stands for all: `calls_of_all`.
        error: what ended the compilation here; empty elsewhere.
    """

    name: str
    program: FileName = ""
    calls: int = 0
    calls_of_all: int = 0
    ran: bool = False
    seconds: float = 0.0
    fired: tuple[Fire, ...] = ()
    refused: tuple[Refusal, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    asked: tuple[Asked, ...] = ()
    error: str = ""


class Block(Data):
    """A storage of the memory plan: from which call to which it lives, where it lies, in bytes.

    Attributes:
        start, size: offset and length at the sizes of the call that was compiled; absent where one is unknown.
    """

    name: str
    first: int
    last: int
    offset: str
    end: str
    returned: bool = False
    start: int | None = None
    size: int | None = None


class Memory(Data):
    """The memory plan: bytes of one block for all storages, and bytes alive at once, in the program's symbols."""

    peak: str
    live: str
    blocks: tuple[Block, ...] = ()


class Order(Data):
    """The order of calls that was chosen, and what each that was tried has alive at once, in bytes."""

    winner: str
    peaks: dict[str, int]
    sizes: str = ""


class Plan(Data):
    """What was decided behind the passes.

    Attributes:
        providers: what each fused operator runs on.
        once: names of values that are computed once, and their bytes.
        cache: what the cache did. `cache_key`: what decides about the result, part by part. `cache_missed`: what
            differed from the nearest program that was stored before, where this one was not stored.
        seconds: what the compilation took behind Dynamo, this bundle included.
    """

    order: Order | None = None
    memory: Memory | None = None
    providers: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    once_bytes: str = "0"
    cache: str = ""
    cache_key: dict[str, str] = Field(default_factory=dict)
    cache_missed: tuple[str, ...] = ()
    seconds: float = 0.0


class Step(Data):
    """A launch of a capture on several streams (plan.schedule.Step)."""

    node: str
    stream: int
    waits: tuple[int, ...] = ()
    record: int = 0
    end: float = 0.0


class Task(Data):
    """A task of a captured graph: its name, the stream of the graph, and the call of the final program it belongs to;
    empty for what copies or waits between the calls."""

    name: str
    stream: int
    node: str = ""


class Captured(Data):
    """A line of `captures.jsonl`: a capture (aclgraph.ledger.Capture), and what had happened before it.

    Attributes:
        steps, joins: the plan of streams; empty where one is used.
        tasks: what was captured, in order; empty where CANN does not tell.
        replays, uncaptured, evicted: of the compiled graph so far.
    """

    key: str
    reason: str
    milliseconds: float
    mebibytes: float
    calls: int
    streams: str = ""
    steps: tuple[Step, ...] = ()
    joins: tuple[int, ...] = ()
    tasks: tuple[Task, ...] = ()
    replays: int = 0
    uncaptured: dict[str, int] = Field(default_factory=dict)
    evicted: tuple[str, ...] = ()


class SavedTensor(Data):
    """A tensor of the first call: where it lies in one of the pieces of memory that `inputs.safetensors` holds as
    bytes. Tensors that shared memory lie in one piece. `stride` and `offset` count elements."""

    memory: Name
    dtype: TorchName
    device: Device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Inputs(Data):
    """What `inputs.json` holds: the program's inputs in order; None is one that was not asked for (a parameter, a
    buffer, another lasting tensor), or that has no value.

    Attributes:
        left_out: names of inputs that were not asked for.
    """

    inputs: tuple[SavedTensor | bool | int | float | None, ...]
    left_out: tuple[str, ...] = ()


class Surroundings(Data):
    """What the calls of a graph need besides their arguments (inspect/surroundings.py).

    Attributes:
        module: what makes it anew when the graph is replayed, and registers its operators.
        inputs: inputs that are neither tensors nor numbers, by name.
        about: what was known when the graph was compiled. `step`: and when its inputs were kept.
    """

    module: Dotted
    inputs: dict[Name, str] = Field(default_factory=dict)
    about: dict[str, JsonValue] = Field(default_factory=dict)
    step: dict[str, JsonValue] | None = None
