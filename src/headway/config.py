"""What a model is: one strict, frozen, serialisable description from which everything else follows.

A choice that excludes others is one field with its own parameters (a tagged union on `type`), never several
booleans: `positions: {type: rope, theta: 10000.0}`. A bare name is shorthand for the tag, `positions: rope`.
What changes the mathematics is a field here and travels with the checkpoint; nothing is guessed from a name.
Values that follow from others (`d_head` from `d_model / n_heads`) are filled in on construction, so a config that
has been written out states all of its numbers.

The run that trains a model is described in `run_config.py`; what a model costs is computed in `cost.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from headway.config_rules import MODEL_RULES, Rule, check_rules, nearest_multiples, translate
from headway.errors import ConfigError

Positive = Annotated[int, Field(gt=0, le=2**40)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Real = Annotated[float, Field(allow_inf_nan=False)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Kind = Literal["decoder", "encoder", "encoder-decoder", "vision"]
Mask = Literal["causal", "full", "sliding"]
Activation = Literal["relu", "gelu", "gelu-tanh", "quick-gelu", "silu", "relu2"]
Pooling = Literal["first", "last", "mean", "attention"]


class Frozen(BaseModel):
    """Base of every part of a config: unknown keys, silent casts and later changes are all errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Checked(Frozen):
    """Base of a whole config: whatever is wrong with it is one ConfigError, and `rules` name what cannot be."""

    rules: ClassVar[Sequence[Rule]] = ()

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise translate(error, type(self)) from None
        self.check()
        check_rules(self, self.rules)

    def check(self) -> None:
        """What a config checks besides its fields and before its rules."""


def as_tagged(value: object) -> object:
    """`"rope"` means `{"type": "rope"}`."""
    return {"type": value} if isinstance(value, str) else value


def as_tuple(value: object) -> object:
    """YAML and JSON know lists only, strict tuples accept tuples only."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Reals = Annotated[tuple[PositiveReal, ...], BeforeValidator(as_tuple)]
Pattern = Annotated[tuple[Mask, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Switches = Annotated[tuple[bool, ...], Field(min_length=1), BeforeValidator(as_tuple)]


# --- positions -------------------------------------------------------------------------------------------------


class NoScaling(Frozen):
    """RoPE as trained."""

    type: Literal["none"] = "none"


class LinearScaling(Frozen):
    """Position interpolation: positions divided by `factor` (arXiv:2306.15595)."""

    type: Literal["linear"] = "linear"
    factor: PositiveReal


class NtkScaling(Frozen):
    """The base theta raised so that the lowest frequency is interpolated and the highest is not."""

    type: Literal["ntk"] = "ntk"
    factor: PositiveReal


class DynamicScaling(Frozen):
    """NTK scaling whose factor grows with the sequence once it exceeds `original_len`."""

    type: Literal["dynamic"] = "dynamic"
    factor: PositiveReal
    original_len: Positive


class YarnScaling(Frozen):
    """NTK by parts with a temperature on the scores (YaRN, arXiv:2309.00071).

    `attention_factor` None means `0.1 ln(factor) + 1`, or the ratio of the two `mscale`s where both are given.
    """

    type: Literal["yarn"] = "yarn"
    factor: PositiveReal
    original_len: Positive
    beta_fast: PositiveReal = 32.0
    beta_slow: PositiveReal = 1.0
    attention_factor: PositiveReal | None = None
    mscale: PositiveReal | None = None
    mscale_all_dim: PositiveReal | None = None
    truncate: bool = True


class LongRopeScaling(Frozen):
    """One divisor per frequency, found by search (LongRoPE, arXiv:2402.13753; Phi-3 model card)."""

    type: Literal["longrope"] = "longrope"
    short: Reals
    long: Reals
    original_len: Annotated[int, Field(gt=1, le=2**40)]
    attention_factor: PositiveReal | None = None


class Llama3Scaling(Frozen):
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1 model card)."""

    type: Literal["llama3"] = "llama3"
    factor: PositiveReal
    original_len: Positive
    low_freq_factor: PositiveReal = 1.0
    high_freq_factor: PositiveReal = 4.0


Scaling = Annotated[
    NoScaling | LinearScaling | NtkScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling,
    Field(discriminator="type"),
    BeforeValidator(as_tagged),
]


class NoPositions(Frozen):
    """Order is left to the causal mask."""

    type: Literal["none"] = "none"


class Sinusoidal(Frozen):
    """Fixed sines and cosines added to the embeddings (arXiv:1706.03762, section 3.5).

    `layout` interleaved puts sin and cos in turn (the paper); split puts all sines first (tensor2tensor, Marian).
    """

    type: Literal["sinusoidal"] = "sinusoidal"
    theta: PositiveReal = 10000.0
    layout: Literal["interleaved", "split"] = "interleaved"


class Learned(Frozen):
    """A trained vector per position; `offset` rows are skipped at the start of the table (OPT and RoBERTa: 2)."""

    type: Literal["learned"] = "learned"
    offset: Count = 0


class Relative(Frozen):
    """T5's bias per head and bucket of distance (arXiv:1910.10683, section 2.1)."""

    type: Literal["relative"] = "relative"
    buckets: Positive = 32
    max_distance: Positive = 128


class Alibi(Frozen):
    """Scores fall linearly with distance, a fixed slope per head (arXiv:2108.12409)."""

    type: Literal["alibi"] = "alibi"


class Rope(Frozen):
    """Rotary positions (arXiv:2104.09864) on the first `fraction` of each head.

    `layout` half pairs dimension i with i + H/2 (GPT-NeoX, Llama in Hugging Face's form); interleaved pairs
    2i with 2i + 1 (the paper, GPT-J). The two are the same model with permuted projection rows.
    `layers` says which layers turn at all, repeated over the depth (SmolLM3: three of four, arXiv:2501.18795).
    `window_theta` is another theta, unscaled, for sliding layers (Gemma 3, ModernBERT).
    """

    type: Literal["rope"] = "rope"
    theta: PositiveReal = 10000.0
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling = NoScaling()
    layers: Switches = (True,)
    window_theta: PositiveReal | None = None


Positions = Annotated[
    NoPositions | Sinusoidal | Learned | Relative | Alibi | Rope,
    Field(discriminator="type"),
    BeforeValidator(as_tagged),
]


# --- norm, attention, feed-forward -----------------------------------------------------------------------------


class LayerNorm(Frozen):
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv:1607.06450)."""

    type: Literal["layernorm"] = "layernorm"
    eps: PositiveReal = 1e-5
    bias: bool = True


class RMSNorm(Frozen):
    """x / sqrt(mean(x^2) + eps) * (weight + offset) (arXiv:1910.07467); Gemma stores weight - 1: offset 1."""

    type: Literal["rmsnorm"] = "rmsnorm"
    eps: PositiveReal = 1e-6
    offset: Annotated[int, Field(ge=0, le=1)] = 0


Norm = Annotated[LayerNorm | RMSNorm, Field(discriminator="type"), BeforeValidator(as_tagged)]


class Attention(Frozen):
    """softmax(q k^T * scale) v, per head.

    `pattern` is one mask per layer, repeated over the depth; in an encoder-decoder it describes the encoder (the
    decoder is causal wherever the encoder is full). `window` is the number of keys a query sees in a sliding
    layer: itself and the window - 1 before it (causal), or those closer than `window` on either side (full).
    `scale` None is 1 / sqrt(d_head). `qk_norm` normalises queries and keys before positions, per head
    (arXiv:2302.05442) or over all heads at once (OLMo 2, arXiv:2501.00656). `softcap` c replaces a score s by
    c * tanh(s / c) (arXiv:2408.00118).
    `cross_every` k: every k-th decoder layer attends to the encoder; 0 for kinds without an encoder.
    """

    pattern: Pattern = ("causal",)
    window: Positive | None = None
    qk_norm: Literal["none", "layernorm", "rmsnorm"] = "none"
    qk_norm_over: Literal["head", "all"] = "head"
    softcap: PositiveReal | None = None
    scale: PositiveReal | None = None
    bias: bool = False
    output_bias: bool = False
    dropout: Probability = 0.0
    cross_every: Count = 0


def as_attention(value: object) -> object:
    """`attention: full` means `{"pattern": ["full"]}`."""
    return {"pattern": value} if isinstance(value, str | list | tuple) else value


class Experts(Frozen):
    """A mixture of `experts` feed-forward networks of which each token visits `top_k` (arXiv:1701.06538).

    `normalize` rescales the chosen gates to sum to one (Mixtral); `balance` weighs the load-balancing loss of
    Switch Transformers (arXiv:2101.03961, equation 4). No token is ever dropped.
    """

    experts: Positive
    top_k: Positive = 2
    normalize: bool = True
    balance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01


class FeedForward(Frozen):
    """down(act(up x)), or gated: down(act(gate x) * up x) (arXiv:2002.05202). relu2 is arXiv:2109.08668."""

    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    experts: Experts | None = None


FEED_FORWARD_NAMES: Mapping[str, tuple[str, bool]] = {
    **{name: (name, False) for name in get_args(Activation)},
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
    "reglu": ("relu", True),
}


def as_feed_forward(value: object) -> object:
    """`feed_forward: swiglu` means `{"activation": "silu", "gated": true}`."""
    if isinstance(value, str) and value in FEED_FORWARD_NAMES:
        activation, gated = FEED_FORWARD_NAMES[value]
        return {"activation": activation, "gated": gated}
    if isinstance(value, str):
        raise PydanticCustomError("literal_error", "{expected}", {"expected": ", ".join(FEED_FORWARD_NAMES)})
    return value


# --- embeddings and heads --------------------------------------------------------------------------------------


class Patch(Frozen):
    """Cut an image of `image` x `image` pixels into `size` x `size` patches (arXiv:2010.11929).

    `first_token` puts the [CLS] vector in front, which a head may read; `registers` more learned vectors follow it
    (DeiT's distillation token, arXiv:2012.12877).
    """

    size: Positive
    image: Positive
    channels: Positive = 3
    first_token: bool = True
    registers: Count = 0
    bias: bool = True

    @property
    def extra(self) -> int:
        """Learned vectors in front of the patches."""
        return int(self.first_token) + self.registers

    @property
    def count(self) -> int:
        """Positions of one image: its patches and the learned vectors."""
        return (self.image // self.size) ** 2 + self.extra

    @property
    def pixels(self) -> int:
        """Numbers of one patch."""
        return self.channels * self.size**2


class Audio(Frozen):
    """A log-mel spectrogram, `bins` x `frames`, through two convolutions, the second of stride 2 (arXiv:2212.04356)."""

    bins: Positive = 80
    frames: Positive = 3000

    @property
    def count(self) -> int:
        """Positions of one recording."""
        return (self.frames + 1) // 2


class Embeddings(Frozen):
    """From ids, patches or sound to vectors: token + position + token type, scaled, normalised, dropped.

    In an encoder-decoder the two sides share the token table; positions and norms are each side's own.
    `tied` shares the token table with the output head. `scale` multiplies token vectors (Gemma: sqrt(d_model)).
    `width` is that of the tables where it is not d_model: a projection follows (ELECTRA, arXiv:2003.10555).
    `leads` lets `norm` stand for the first block's own norm, which is left out (ModernBERT, arXiv:2412.13663).
    """

    tied: bool = False
    scale: PositiveReal = 1.0
    token_types: Count = 0
    norm: bool = False
    leads: bool = False
    width: Positive | None = None
    patch: Patch | None = None
    audio: Audio | None = None

    @property
    def patch_count(self) -> int:
        """Positions that an image takes, learned vectors included; 0 without a patch front end."""
        return self.patch.count if self.patch else 0


class CausalLM(Frozen):
    """Logits of the next token at every position; the decoder half of an encoder-decoder has this head too.

    `scale` multiplies the states before the output (T5 with a tied table: 1 / sqrt(d_model)).
    """

    type: Literal["causal-lm"] = "causal-lm"
    bias: bool = False
    softcap: PositiveReal | None = None
    scale: PositiveReal = 1.0


class MaskedLM(Frozen):
    """Logits of the hidden tokens; `transform` is BERT's dense, activation, norm before the output."""

    type: Literal["masked-lm"] = "masked-lm"
    transform: bool = True
    transform_bias: bool = True
    bias: bool = True


class SequenceClassification(Frozen):
    """One label per sequence, read from the pooled state; `problem` picks the loss.

    `transform` is the activation of a dense layer between the two (BERT's pooler: tanh).
    """

    type: Literal["sequence-classification"] = "sequence-classification"
    labels: Positive = 2
    pooling: Pooling = "first"
    transform: Literal["none", "tanh", "relu", "gelu"] = "none"
    bias: bool = True
    problem: Literal["single", "multi", "regression"] = "single"


class TokenClassification(Frozen):
    """One label per token."""

    type: Literal["token-classification"] = "token-classification"
    labels: Positive = 2


class Span(Frozen):
    """Start and end of an answer: two logits per token."""

    type: Literal["span"] = "span"


class PooledEmbedding(Frozen):
    """One vector per sequence; contrastive training compares them by cosine over `temperature`. `transform` tanh is
    BERT's pooler, `projection` the size of a last map (CLIP, arXiv:2103.00020), `max_len` what longer texts are cut to.
    """

    type: Literal["pooled-embedding"] = "pooled-embedding"
    pooling: Pooling = "mean"
    transform: Literal["none", "tanh"] = "none"
    projection: Positive | None = None
    projection_bias: bool = False
    normalize: bool = True
    max_len: Positive | None = None
    temperature: PositiveReal = 0.05


class ImageClassification(Frozen):
    """One label per image."""

    type: Literal["image-classification"] = "image-classification"
    labels: Positive = 2
    pooling: Pooling = "first"


class MaskedPatches(Frozen):
    """The pixels of hidden patches, foretold by one linear map (SimMIM, arXiv:2111.09886)."""

    type: Literal["masked-patches"] = "masked-patches"


TextHead = CausalLM | MaskedLM | SequenceClassification | TokenClassification | Span | PooledEmbedding
Head = Annotated[
    TextHead | ImageClassification | MaskedPatches,
    Field(discriminator="type"),
    BeforeValidator(as_tagged),
]


class Init(Frozen):
    """Weights ~ N(0, std^2); `residual` says how the projections that write to the residual stream begin.

    scaled: std / sqrt(2 n_layers) (GPT-2); zero: every pre-norm block starts as the identity
    (arXiv:2203.03466 practice); plain: std. `std` None is 1 / sqrt(fan_in), the variance-preserving choice.
    """

    std: PositiveReal | None = 0.02
    residual: Literal["plain", "scaled", "zero"] = "scaled"


class Tokens(Frozen):
    """Ids with a meaning of their own; None where the model has no such token. `ends` end a text as `eos` does."""

    bos: Count | None = None
    eos: Count | None = None
    ends: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = ()
    pad: Count | None = None
    mask: Count | None = None
    decoder_start: Count | None = None


# --- the model -------------------------------------------------------------------------------------------------

DEFAULT_HEAD = {"decoder": "causal-lm", "encoder": "masked-lm", "encoder-decoder": "causal-lm"}
DEFAULT_HEAD |= {"vision": "image-classification"}


class ModelConfig(Checked):
    """A Transformer, completely.

    The published names of the sizes: `d_model` hidden_size, `n_layers` num_hidden_layers, `n_heads`
    num_attention_heads, `n_kv_heads` num_key_value_heads (equal to `n_heads`: multi-head; 1: multi-query; between:
    grouped-query), `d_head` head_dim, `d_ff` intermediate_size, `max_len` max_position_embeddings.
    In an encoder-decoder `n_layers` is the encoder's depth and `n_decoder_layers` the decoder's.
    `placement` and `residual`: see nn/block.py. `layer_scale` is where the learned factor per channel on each residual
    branch begins (arXiv:2103.17239), None without one.

    Raises:
        ConfigError: naming the field (both fields, for a combination that cannot be).
    """

    kind: Kind = "decoder"
    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    n_kv_heads: Positive
    d_head: Positive
    d_ff: Positive
    vocab_size: Count
    max_len: Positive
    n_decoder_layers: Count = 0
    attention: Annotated[Attention, BeforeValidator(as_attention)] = Attention()
    positions: Positions = Rope()
    norm: Norm = RMSNorm()
    placement: Literal["pre", "post", "sandwich", "inside"] = "pre"
    residual: Literal["sequential", "parallel"] = "sequential"
    layer_scale: PositiveReal | None = None
    feed_forward: Annotated[FeedForward, BeforeValidator(as_feed_forward)] = FeedForward()
    embeddings: Embeddings = Embeddings()
    dropout: Probability = 0.0
    head: Head = CausalLM()
    init: Init = Init()
    tokens: Tokens = Tokens()

    rules: ClassVar = MODEL_RULES

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, fields: Any) -> Any:
        return derive(fields) if isinstance(fields, dict) else fields

    def masks(self, *, decoder: bool) -> Iterator[Literal["causal", "full"]]:
        """The direction of each layer of the encoder or decoder stack, before windows."""
        depth = self.n_decoder_layers if decoder and self.kind == "encoder-decoder" else self.n_layers
        for index in range(depth):
            mask = self.attention.pattern[index % len(self.attention.pattern)]
            yield "causal" if decoder or mask == "causal" else "full"

    def window(self, layer: int) -> int | None:
        """The window of a sliding layer, None for the others."""
        pattern = self.attention.pattern
        return self.attention.window if pattern[layer % len(pattern)] == "sliding" else None

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; its SHA-256 names the config."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def derive(fields: dict[str, Any]) -> dict[str, Any]:
    """Fill in what follows from other fields; values of a wrong type are left for the field checks to report."""
    out = dict(fields)
    kind = out.get("kind", "decoder")

    def number(name: str) -> int | None:
        value = out.get(name)
        return value if type(value) is int and value > 0 else None

    def default(name: str, value: int | None) -> None:
        if out.get(name) is None and value is not None:
            out[name] = value

    d_model, n_heads = number("d_model"), number("n_heads")
    default("n_kv_heads", n_heads)
    if d_model and n_heads and out.get("d_head") is None:
        if d_model % n_heads:
            found = f"width {d_model} cannot be divided among {n_heads} heads"
            wanted = "a width that is a multiple of the heads, or an explicit d_head"
            fix = f"d_model={nearest_multiples(d_model, n_heads)}"
            raise ConfigError("d_model and n_heads", found, wanted, fix)
        out["d_head"] = d_model // n_heads
    default("d_ff", 4 * d_model if d_model else None)
    if kind == "encoder-decoder":
        default("n_decoder_layers", number("n_layers"))
    attention = as_attention(out.get("attention", {}))
    if isinstance(attention, dict):
        direction = "causal" if kind == "decoder" else "full"
        out["attention"] = {"pattern": (direction,), "cross_every": int(kind == "encoder-decoder"), **attention}
    embeddings, name = out.get("embeddings"), "patch" if kind == "vision" else "audio"
    front = embeddings.get(name) if isinstance(embeddings, dict) else getattr(embeddings, name, None)
    hears = kind == "encoder" and front is not None
    if isinstance(kind, str) and kind in DEFAULT_HEAD:
        head = as_tagged(out.get("head", "sequence-classification" if hears else DEFAULT_HEAD[kind]))
        # The first token of a decoder has seen nothing but itself.
        reads_last = kind == "decoder" and isinstance(head, dict) and head.get("type") == "sequence-classification"
        out["head"] = {"pooling": "last", **head} if reads_last and isinstance(head, dict) else head
    if kind == "vision" or hears:
        out.setdefault("vocab_size", 0)
        out.setdefault("positions", "learned")
        default("max_len", _count(front, Audio if hears else Patch))
    return out


def _count(front: object, cls: type[Patch | Audio]) -> int | None:
    """Positions of an image or a recording."""
    try:
        return (front if isinstance(front, cls) else cls.model_validate(front)).count
    except ValidationError:
        return None  # reported by the field's own check


def with_fields(config: ModelConfig, **fields: object) -> ModelConfig:
    """A copy with some fields replaced, checked like a new config."""
    return ModelConfig(**{**{name: getattr(config, name) for name in type(config).model_fields}, **fields})
