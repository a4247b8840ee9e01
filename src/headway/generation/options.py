"""What to generate and how: one frozen, validated description, the same for library, command and server.

Every field is checked on construction, so that nothing later in the loop can meet a NaN temperature or a billion
samples. The neutral value of each option (listed beside it) costs nothing: the loop leaves the step out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from headway.config import Checked, as_tuple
from headway.config_rules import Rule
from headway.errors import ConfigError

MAX_SAMPLES = 128  # OpenAI's limit on n
MAX_BEAMS = 256
MAX_LOGPROBS = 20
# Below this a temperature is greedy: dividing float32 logits by less would overflow.
COLDEST = 1e-5

Tokens = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
UpToOne = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Additive = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _by_id(value: object) -> object:
    """JSON spells the ids of `logit_bias` as strings: {"50256": -100}."""
    if not isinstance(value, Mapping):
        return value
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v for k, v in value.items()}


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def _set_beside_beams(options: GenerationOptions) -> list[str]:
    """Sampling fields that somebody chose although a beam search samples nothing."""
    return [name for name in SAMPLING if name in options.model_fields_set]


OPTION_RULES: tuple[Rule, ...] = (
    Rule(
        ("min_tokens", "max_tokens"),
        lambda o: o.min_tokens > o.max_tokens,
        lambda o: f"at least {o.min_tokens} and at most {o.max_tokens} tokens",
        "min_tokens up to max_tokens",
        lambda o: f"min_tokens={o.max_tokens}",
    ),
    Rule(
        ("n", "beams"),
        lambda o: o.beams > 1 and o.n > o.beams,
        lambda o: f"the {o.n} best of {o.beams} beams",
        "n up to beams",
        lambda o: f"beams={o.n}",
    ),
    Rule(
        ("beams", "sampling"),
        lambda o: o.beams > 1 and bool(_set_beside_beams(o)),
        lambda o: f"{o.beams} beams with {', '.join(_set_beside_beams(o))}: a beam search does not sample",
        "one or the other",
        lambda o: "beams=1",
    ),
    Rule(
        ("beams", "stop"),
        lambda o: o.beams > 1 and bool(o.stop),
        lambda o: f"{o.beams} beams with stop strings, which are found in one text and not in a search",
        "stop_ids, or one beam",
        lambda o: "beams=1",
    ),
    Rule(
        ("beams", "logprobs"),
        lambda o: o.beams > 1 and o.logprobs is not None,
        lambda o: f"{o.beams} beams with logprobs",
        "the score that every beam carries, or one beam",
        lambda o: "beams=1",
    ),
    Rule(
        ("beams", "lookup"),
        lambda o: o.beams > 1 and o.lookup > 0,
        lambda o: f"{o.beams} beams with lookup={o.lookup}, which guesses one text",
        "one beam",
        lambda o: "lookup=0",
    ),
    Rule(
        ("beams", "context_shift"),
        lambda o: o.beams > 1 and o.context_shift,
        lambda o: f"{o.beams} beams with context_shift, which goes on with one text",
        "one beam",
        lambda o: "context_shift=false",
    ),
    Rule(
        ("length_penalty", "beams"),
        lambda o: o.beams == 1 and bool({"length_penalty", "early_stopping"} & o.model_fields_set),
        lambda o: "length_penalty or early_stopping without a beam search",
        "beams of at least 2",
        lambda o: "beams=4",
    ),
)


class GenerationOptions(Checked):
    """How to continue prompts.

    Order of work on the logits: repetition, presence and frequency penalties, logit_bias, the ban on stopping before
    `min_tokens`, temperature, top_k, top_p, min_p, typical_p. At least one candidate always remains.

    Length: max_tokens, min_tokens (0): new tokens; the text also ends where the model's context does, but for
    context_shift.
    Choice: temperature 0 takes the most likely token (so does any below 1e-5). top_k (0), top_p (1.0,
    arXiv:1904.09751; 0 keeps one candidate), min_p (0.0, arXiv:2407.01082), typical_p (1.0, arXiv:2202.00666).
    repetition_penalty (1.0) divides positive and multiplies negative logits of every token of prompt and
    continuation (arXiv:1909.05858); presence_penalty and frequency_penalty (0.0) are subtracted once, and once per
    occurrence, for tokens of the continuation (OpenAI's API). logit_bias ({}) is added per token id.
    Ending: stop strings (at most 16; cut off the text), stop_ids (besides the end token), ignore_eos.
    context_shift lets a text go on where the context is full: its first `sinks` (4) tokens and its end, half of the
    context together, are read again as the beginning of a new one.
    Samples: n continuations per prompt; seed None draws a fresh one, and the result says which.
    Report: logprobs k gives the chosen token's log-probability and the k best, of the model's own distribution
    before any option, so that they stay finite; echo puts the prompt in front.
    Prompt: add_bos puts the begin token in front; truncate left drops the oldest tokens of a prompt that is too
    long, where the default is an error.
    Beam search: beams (1) live hypotheses, of which the n best are returned; their score is the sum of
    log-probabilities over length ** length_penalty. early_stopping True ends at `beams` finished hypotheses, False
    when no live one beats the worst finished one at its present length, "never" when none could at any length.
    batch_size: sequences decoded together; results do not depend on it.
    Speed: lookup (0) is how many tokens to guess ahead from what stood here before, draft_tokens (4) how many a draft
    model guesses where there is one, in a text of its own; but for rounding they change nothing else. kv_dtype (auto)
    is what keys and values are kept in: model is the model's own, float16 and int8 take a half or a quarter of
    float32's memory; auto is float16 beside weights in codes, and model otherwise.

    Raises:
        ConfigError: naming the field, or both fields of a combination that cannot be.
    """

    max_tokens: Tokens = 128
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.8
    top_k: TokenId = 0
    top_p: UpToOne = 1.0
    min_p: UpToOne = 0.0
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 1.0
    presence_penalty: Additive = 0.0
    frequency_penalty: Additive = 0.0
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_by_id)] = Field(default_factory=dict)
    stop: Annotated[tuple[StopString, ...], BeforeValidator(as_tuple), Field(max_length=16)] = ()
    stop_ids: Annotated[tuple[TokenId, ...], BeforeValidator(as_tuple)] = ()
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    add_bos: bool = False
    truncate: Literal["error", "left"] = "error"
    beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] = 1
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    early_stopping: bool | Literal["never"] = False
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    lookup: Annotated[int, Field(ge=0, le=64)] = 0
    draft_tokens: Annotated[int, Field(ge=1, le=64)] = 4
    context_shift: bool = False
    sinks: Annotated[int, Field(ge=0, lt=2**31)] = 4
    kv_dtype: Literal["auto", "model", "float16", "int8"] = "auto"

    rules: ClassVar = OPTION_RULES

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken; nothing is drawn."""
        return self.temperature < COLDEST

    def check_vocabulary(self, vocab_size: int, end_ids: frozenset[int]) -> None:
        """Raise ConfigError for ids outside the vocabulary, and when `min_tokens` would ban every token."""
        for field, ids in (("logit_bias", self.logit_bias), ("stop_ids", self.stop_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ConfigError(field, f"token id {token_id}", f"an id below the vocabulary's {vocab_size}")
        if self.min_tokens and len(end_ids) >= vocab_size:
            raise ConfigError("min_tokens and stop_ids", "every token ends the text", "a token to go on with")
