"""How a model that exists is adapted: one config for each method. All but `full` leave the base's files as they are.

full         every weight                                            a run of its own
partial      the last blocks, norms, biases                          those weights
lora         a product of two thin matrices beside each matrix       A and B
ia3          a factor for each key, value and hidden unit            the factors
bottleneck   a small network behind attention and feed-forward       its matrices
prefix       keys and values before every layer's own                these
prompt       vectors before the input's                              these
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from headway.config import Count, Frozen, Positive, PositiveReal, as_tagged, as_tuple

Targets = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
BaseDtype = Literal["stored", "float32"]


class FullTuning(Frozen):
    """Train every weight, in float32: what a run on a base does without `tuning` too."""

    type: Literal["full"] = "full"


class PartialTuning(Frozen):
    """Train some of the base's own weights: the last `layers` blocks of the stack that answers, all norms, all biases.

    Biases alone: arXiv:2106.10199. Blocks in codes are unpacked. The form of what is frozen is `base_dtype`'s.
    """

    type: Literal["partial"] = "partial"
    layers: Count = 0
    norms: bool = True
    biases: bool = True
    base_dtype: BaseDtype = "stored"


class LowRankTuning(Frozen):
    """Train adapters of low rank on a base that stays as it is (LoRA, arXiv:2106.09685).

    `alpha` over `rank` scales what they add, with `rslora` over its root; None is twice the rank. `targets` are roles,
    names or patterns of layers (tuning/adapters.py); `rank_pattern` and `alpha_pattern` set some apart, by patterns of
    full names. `dora` learns the length of each row apart from its direction. `start` svd begins with the directions
    that the weight itself stretches most. A new head is trained whole beside them.
    The base keeps the form it has (`stored`, codes too: QLoRA, arXiv:2305.14314) or is unpacked to float32.
    """

    type: Literal["lora"] = "lora"
    rank: Positive = 8
    alpha: PositiveReal | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Targets = ("all",)
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, PositiveReal] = Field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    start: Literal["random", "svd"] = "random"
    base_dtype: BaseDtype = "stored"

    @property
    def scale(self) -> float:
        """Alpha, or what it is by default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class ScalingTuning(Frozen):
    """Train a factor for each key, value and hidden unit (IA)^3, arXiv:2205.05638. `targets` are among k, v, down."""

    type: Literal["ia3"] = "ia3"
    targets: Targets = ("all",)
    base_dtype: BaseDtype = "stored"


class BottleneckTuning(Frozen):
    """Train a network of `size` hidden units behind attention's `output` and the feed-forward's `down`.

    It begins as the identity (arXiv:1902.00751).
    """

    type: Literal["bottleneck"] = "bottleneck"
    size: Positive = 16
    targets: Targets = ("all",)
    base_dtype: BaseDtype = "stored"


class PrefixTuning(Frozen):
    """Train `tokens` keys and values before those of every self-attention (arXiv:2101.00190)."""

    type: Literal["prefix"] = "prefix"
    tokens: Positive = 16
    base_dtype: BaseDtype = "stored"


class PromptTuning(Frozen):
    """Train `tokens` vectors before the embedded input (arXiv:2104.08691), or the patches (arXiv:2203.12119)."""

    type: Literal["prompt"] = "prompt"
    tokens: Positive = 16
    base_dtype: BaseDtype = "stored"


Added = LowRankTuning | ScalingTuning | BottleneckTuning | PrefixTuning | PromptTuning
"""What stands beside the weights."""
Frugal = Added | PartialTuning
"""What leaves a base's files as they are."""


METHODS: Mapping[str, type[Frozen]] = {one.model_fields["type"].default: one for one in (*get_args(Frugal), FullTuning)}
"""The config of each method."""


def _as_lora(value: Any) -> Any:
    """A word is a type; keys without one are LoRA's."""
    value = as_tagged(value)
    return {"type": "lora", **value} if isinstance(value, dict) and value else value


Tuning = Annotated[Frugal | FullTuning, Field(discriminator="type"), BeforeValidator(_as_lora)]
