"""What the compiler refuses: what went wrong, where in the user's model, which rule, what to do next.

This module imports nothing, so that every layer (and the start-up hook) can use it.
"""

from __future__ import annotations


class NpuCompilerError(RuntimeError):
    """An error a user can act on.

    Attributes:
        what: what went wrong, one sentence.
        where: module path or source line in the user's model; empty where no place applies (an option, say).
        rule: the rule that was broken.
        fix: what to do next.
    """

    def __init__(self, what: str, *, where: str = "", rule: str = "", fix: str = "") -> None:
        self.what, self.where, self.rule, self.fix = what, where, rule, fix
        lines = [what]
        lines += [f"  {title}: {text}" for title, text in (("where", where), ("rule", rule), ("fix", fix)) if text]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles through the keyword arguments, so that the error crosses process boundaries whole."""
        return (_rebuild, (type(self), self.what, self.where, self.rule, self.fix))


def _rebuild(kind: type[NpuCompilerError], what: str, where: str, rule: str, fix: str) -> NpuCompilerError:
    return kind(what, where=where, rule=rule, fix=fix)


class OptionError(NpuCompilerError):
    """An option is unknown, has a wrong type or value, or contradicts another."""


class DeviceError(NpuCompilerError):
    """Tensors of the graph lie on devices that one captured graph can't serve together."""


class RuleError(NpuCompilerError):
    """A function of a rewrite rule (its legality, replacement, operands or cost) failed or gave something unusable."""


class PassError(NpuCompilerError):
    """A pass failed: a user's, or one of vLLM's."""


class SpecError(NpuCompilerError):
    """A pass left a program that breaks what holds between passes (npu_compiler/graph/spec.py)."""


class PlanError(NpuCompilerError):
    """A plan of streams would let two calls race, reuse memory too early or leave a stream unjoined."""


class RankError(NpuCompilerError):
    """The ranks of a group planned different collectives, or have different values where they need the same ones."""


class CaptureError(NpuCompilerError):
    """A graph holds something that can't be captured, or the capture itself failed."""


class StaleOutputError(NpuCompilerError):
    """With clone_outputs=False: a replay would overwrite an output that is still in use."""


class StoredProgramError(NpuCompilerError):
    """A compiled program that was stored can't be used here."""


class BundleError(NpuCompilerError):
    """A bundle can't be read, or what it holds can't be done here."""


class TraceError(NpuCompilerError):
    """A timeline can't be recorded or read."""


class UnservedError(NpuCompilerError, NotImplementedError):
    """A layer of a vLLM model that is not served on npu."""


class TrainingWarning(UserWarning):
    """A compiled function needs gradients, so it runs without passes and without capture."""


class WatchWarning(UserWarning):
    """The option `watch` names a place that the program has not."""


class CaptureBudgetWarning(UserWarning):
    """A shape does not fit into what captures may take, so it runs uncaptured."""
