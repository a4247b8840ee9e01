"""How configs say what takes more than one key: rotary positions, patterns of layers, labels, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headway.config import LongRopeScaling, ModelConfig, Rope
from headway.errors import InputError
from headway.families._table import Key, Special

Raw = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick-gelu",
    "relu2": "relu2",
    "gelu_python": "gelu",
}


def sizes(**names: int | None) -> dict[str, Key]:
    """The sizes under their usual names, with the defaults of this family."""
    return {theirs: Key(SIZES[theirs], default) for theirs, default in names.items()}


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_len",
}

# --- rotary positions --------------------------------------------------------------------------------------------

# Their names of the fields of a scaling, by its type; what a file leaves out keeps our default.
_SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_len",
        **{name: name for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")},
        "truncate": "truncate",
    },
    "longrope": {
        "short_factor": "short",
        "long_factor": "long",
        "original_max_position_embeddings": "original_len",
        "attention_factor": "attention_factor",
    },
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}


def rope(theta: float = 10000.0, *, fraction: float | None = None, local: float | None = None) -> Special:
    """RoPE from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`; written in both forms.

    `fraction` is the default share of a head that turns, None where an architecture always turns the whole head.
    `local` is the default theta of sliding layers where these have one of their own (`rope_local_base_freq`).
    """

    def read(raw: Raw) -> dict[str, object]:
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        full = _part(given, "full_attention", given)
        own = _part(raw.get("rope_parameters") or {}, "sliding_attention", {})
        used = _first(full, THETAS[:1], _first(raw, THETAS, theta))
        share = _first(full, SHARES[:1], _first(raw, SHARES, fraction or 1.0))
        if fraction is None and share != 1:
            raise InputError("partial_rotary_factor", repr(share)[:80], "1.0: here a head turns as a whole")
        out = {"positions.type": "rope", "positions.theta": used, "positions.fraction": share, **_scaling(full, raw)}
        window = _first(own, THETAS[:1], _first(raw, WINDOW_THETAS, local))
        if local is not None and (window != used or "positions.scaling.type" in out):
            out["positions.window_theta"] = window
        return out

    def write(config: ModelConfig) -> dict[str, object]:
        positions = config.positions
        if not isinstance(positions, Rope):
            return {}
        full: dict[str, object] = {"rope_type": "default", "rope_theta": positions.theta}
        if fraction is not None and not fraction == positions.fraction == 1.0:
            full["partial_rotary_factor"] = positions.fraction
        scaling = positions.scaling
        extra: dict[str, object] = {}
        if scaling.type in _SCALINGS:
            given = scaling.model_dump(mode="json", exclude_none=True)
            full["rope_type"] = scaling.type
            full |= {theirs: given[ours] for theirs, ours in _SCALINGS[scaling.type].items() if ours in given}
            extra = {"rope_scaling": dict(full)}
        if isinstance(scaling, LongRopeScaling):
            extra["original_max_position_embeddings"] = scaling.original_len
        if local is None:
            return {"rope_parameters": full, "rope_theta": positions.theta, **extra}
        own = {"rope_type": "default", "rope_theta": positions.window_theta or positions.theta}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": own}}

    return Special(read, write)


THETAS = ("rope_theta", "global_rope_theta", "rotary_emb_base")  # the second is ModernBERT's, the last GPT-NeoX's
WINDOW_THETAS = ("rope_local_base_freq", "local_rope_theta")
SHARES = ("partial_rotary_factor", "rotary_pct")


def _first(given: Raw, names: Sequence[str], default: Any) -> Any:
    """The value of the first of `names` that is there and not null."""
    return next((given[name] for name in names if given.get(name) is not None), default)


def _part(given: Raw, name: str, default: Raw) -> Raw:
    """The parameters of one type of layer, whose rotary type must be the default one where others scale."""
    part = _first(given, (name,), default)
    if not isinstance(part, Mapping):
        raise InputError(f"rope_parameters.{name}", repr(part)[:80], "keys and values")
    if name == "sliding_attention" and part.get("rope_type", "default") != "default":
        raise InputError(f"rope_parameters.{name}", f"rope_type {part['rope_type']!r:.80}", "default")
    return part


def _scaling(given: Raw, raw: Raw) -> dict[str, object]:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in ("default", "mrope") and "factor" not in given:
        return {}
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise InputError("rope_parameters", f"rope_type {kind!r:.40}", f"one of default, {', '.join(_SCALINGS)}")
    out: dict[str, object] = {"positions.scaling.type": kind}
    for theirs, ours in _SCALINGS[kind].items():
        value = given.get(theirs)
        if ours == "original_len":  # what the config says of the model as a whole goes first, as with Phi-3
            value = _first(raw, (theirs,), value or raw.get("max_position_embeddings"))
        if value is not None:
            out[f"positions.scaling.{ours}"] = value
    if kind == "dynamic":
        out["positions.scaling.original_len"] = raw.get("max_position_embeddings")
    return out


# --- patterns of layers ------------------------------------------------------------------------------------------


def shortest(pattern: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest period of a pattern: what repeats is said once."""
    for length in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % length] for i in range(len(pattern))):
            return tuple(pattern[:length])
    return tuple(pattern)


def windows(
    default: Callable[[Raw, int], bool] | None = None,
    *,
    key: str = "sliding_window",
    size: int | None = None,
    full: str = "causal",
    inverse: tuple[Callable[[int], int], Callable[[int], int]] = (lambda width: width, lambda window: window),
    switch: str | None = None,
) -> Special:
    """Which layers slide: `layer_types`, or `default(their config, layer)` where a file does not say.

    `key` names the width, `size` its default; `inverse` turns theirs into our count of visible keys and back. Without
    `default` every layer slides where a width is given, whatever `layer_types` says. Windows are off unless the key
    `switch`, if any, is true.
    """

    def read(raw: Raw) -> dict[str, object]:
        width = raw.get(key, size) if switch is None or raw.get(switch, False) else None
        depth, types = raw["num_hidden_layers"], raw.get("layer_types") or None
        if default is None or types is None:
            slides = [default is None or default(raw, i) for i in range(depth)]
        else:
            slides = [one == "sliding_attention" for one in types]
            other = [one for one, slid in zip(types, slides, strict=True) if not slid and one != "full_attention"]
            if other or len(types) != depth:
                found = f"{other[0]!r:.80}" if other else f"{len(types)} of {depth} layers"
                raise InputError("layer_types", found, "full_attention or sliding_attention for each layer")
        slides = [bool(width) and one for one in slides]
        pattern = shortest(["sliding" if one else full for one in slides]) or (full,)
        used = inverse[0](width) if width and "sliding" in pattern else None
        return {"attention.pattern": pattern, "attention.window": used}

    def write(config: ModelConfig) -> dict[str, object]:
        window = config.attention.window
        # Where the layers say for themselves that none slides, a width is asked for all the same.
        out: dict[str, object] = {key: inverse[1](window) if window else size if default is not None else None}
        if default is not None:
            slides = [config.window(layer) is not None for layer in range(config.n_layers)]
            out["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
        if switch is not None:
            out[switch] = window is not None
        return out

    return Special(read, write)


# --- labels and tokens -------------------------------------------------------------------------------------------

_PROBLEMS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


def labels() -> Special:
    """The number of classes (`id2label` or `num_labels`, two by default) and the kind of loss."""

    def read(raw: Raw) -> dict[str, object]:
        count = len(raw["id2label"]) if raw.get("id2label") else raw.get("num_labels", 2)
        out: dict[str, object] = {"head.labels": count}
        problem = _PROBLEMS.get(raw.get("problem_type") or ("regression" if count == 1 else ""))
        return out | ({"head.problem": problem} if problem else {})

    def write(config: ModelConfig) -> dict[str, object]:
        count = getattr(config.head, "labels", None)
        if count is None:
            return {}
        back = {ours: theirs for theirs, ours in _PROBLEMS.items()}
        names = {str(i): f"LABEL_{i}" for i in range(count)}
        out: dict[str, object] = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
        problem = getattr(config.head, "problem", "single")
        return out | ({"problem_type": back[problem]} if problem != "single" else {})

    return Special(read, write)


_TOKENS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "decoder_start_token_id": "decoder_start",
}


def tokens(**defaults: int | None) -> Special:
    """Special ids under their usual names, several end tokens among them; what lies outside the vocabulary is no id."""

    def read(raw: Raw) -> dict[str, object]:
        size = raw.get("vocab_size")

        def usable(value: object) -> bool:
            return type(value) is int and value >= 0 and (size is None or value < size)

        out: dict[str, object] = {}
        for theirs, ours in _TOKENS.items():
            value = raw.get(theirs, defaults.get(ours))
            several = [one for one in (value if isinstance(value, list) else [value]) if usable(one)]
            if several:
                out[f"tokens.{ours}"] = several[0]
            if len(several) > 1 and ours == "eos":
                out["tokens.ends"] = tuple(several[1:])
        return out

    def write(config: ModelConfig) -> dict[str, object]:
        ids = {theirs: getattr(config.tokens, ours) for theirs, ours in _TOKENS.items()}
        if config.kind != "encoder-decoder" and config.tokens.decoder_start is None:
            del ids["decoder_start_token_id"]
        if config.tokens.ends:
            ids["eos_token_id"] = [config.tokens.eos, *config.tokens.ends]
        return ids

    return Special(read, write)
