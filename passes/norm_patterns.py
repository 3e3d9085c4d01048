"""How RMS normalisation is written: vLLM's operator, or the arithmetic that Hugging Face models spell out."""

from __future__ import annotations

from npu_compiler.facts.sizes import Fact, equal, known
from npu_compiler.passes.pattern import Any, Call, Cast, Exactly, Match, Number, OneOf, Pattern

GEMMA_WEIGHT = Call("aten.add.Tensor", Cast(Any("weight")), Exactly(1), name="factor")
"""Gemma stores its norm weights less one, and adds the one in float32."""


def rms_norm(x: Pattern, again: Pattern, tag: str = "", factor: Pattern | None = None) -> Pattern:
    """x / sqrt(mean(x^2) + epsilon) * weight, with conversions to float32 and back where a model has them.

    Args:
        x: pattern of the input. `again`: the same at its second use; must name what `x` bound.
        tag: suffix of the bound names `weight`, `epsilon` and `dims`.
        factor: pattern of what the normalised value is multiplied by, if it is not the weight itself.
    """
    factor = factor or Any("weight" + tag)
    wide, wide_again = Cast(x), Cast(again)
    square = OneOf(
        (
            Call("aten.pow.Tensor_Scalar", wide_again, Exactly(2)),
            Call("aten.mul.Tensor", wide_again, wide_again),
        )
    )
    mean = Call("aten.mean.dim", square, Any("dims" + tag), Exactly(True))
    scale = Call("aten.rsqrt.default", Call("aten.add.Tensor|aten.add.Scalar", mean, Number("epsilon" + tag)))
    normed = Cast(Call("aten.mul.Tensor", wide, scale, commutes=True))
    written_out = Cast(Call("aten.mul.Tensor", factor, normed, commutes=True))
    vllm = Call("vllm_ir.rms_norm.default", x, factor, Number("epsilon" + tag), Exactly(None))
    return OneOf((vllm, written_out))


def legal_norm(match: Match, width: object, tag: str = "") -> Fact:
    """Whether the norm is over the last dimension only, of size `width`, with one weight an element.

    The weight has to be a tensor: where a pattern does not say so, the caller asks.
    """
    weight = match.tensor("weight" + tag)
    dims = match.bindings.get("dims" + tag)
    verdict = known(weight.dim() == 1, f"the weight has {weight.dim()} dimensions")
    if dims is not None:
        verdict = verdict & known(_last_only(dims, match), f"the mean is over dimensions {dims}")
    return verdict & equal(weight.shape[0], width, "weight and last dimension") if verdict else verdict  # type: ignore[arg-type]


def _last_only(dims: object, match: Match) -> bool:
    rank = match.root.meta["val"].dim()
    return isinstance(dims, (list, tuple)) and len(dims) == 1 and dims[0] in (-1, rank - 1)
