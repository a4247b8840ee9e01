"""`headway inspect PATH`: what a model is made of, its tensors, the shapes in one block, what it costs, where it loads.

PATH is any model that `load` takes, or a YAML file with model fields (or a run config with explicit sizes). Fields can
also be given as overrides alone: `headway inspect d_model=64 n_layers=2 n_heads=2 vocab_size=99 max_len=32`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from headway.cli.options import Common, option
from headway.cli.output import Printer, note, size
from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.config import ModelConfig
    from headway.loading import Loaded

Row = tuple[str, str, tuple[int, ...], str]


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway inspect` takes."""

    batch: Annotated[int, option("--batch", "-B", min=1, help="B, sequences, for the shapes.")] = 1
    length: Annotated[int | None, option("--length", "-T", min=1, help="T, tokens, for the shapes [max_len].")] = None
    tower: Annotated[str | None, option(help="text or vision, of a folder that holds both (CLIP, SigLIP).")] = None
    tensors: Annotated[bool, option("--tensors", help="List every tensor; else equal layers are one line.")] = False
    schema: Annotated[bool, option("--schema", help="Print the JSON Schema of a model config and stop.")] = False


def run(options: Options) -> None:
    """Print the parts, the shapes, the cost."""
    from headway.cost import parameters

    printer = Printer(json=options.json)
    if options.schema:
        return _schema(printer)
    found = find(options)
    config, loaded = found.config, found.loaded
    length = min(options.length or config.max_len, config.max_len)
    parts = parameters(config)
    rows = shapes(config, options.batch, length)
    costs = cost_of(config, length)
    total = sum(parts.values())
    family = (loaded.family if loaded else "") or "headway"
    digest = loaded.weights_sha256 if loaded else None
    tensors = tensors_of(loaded) if loaded else {}
    where = runtimes_of(loaded) if loaded else {}
    receipt = dict(loaded.receipt) if loaded else {}
    printer.say(f"{config.kind} ({family}), {total:,} parameters{', weights sha256 ' + digest if digest else ''}")
    for line in found.notes:
        printer.say(line)
    printer.say()
    printer.table(((name, f"{count:,}", f"{count / total:.1%}") for name, count in parts.items()), right=True)
    if tensors:
        printer.say("\nTensors:")
        printer.table(_listed(tensors, whole=options.tensors))
    printer.say(f"\nOne block, B = {options.batch}, T = {length}:")
    printer.table((name, letters, " x ".join(map(str, shape)), what) for name, letters, shape, what in rows)
    printer.say(f"\nCost at {length} tokens, float32:")
    printer.table(((name.replace("_", " "), size(value, unit)) for name, (value, unit) in costs.items()), right=True)
    if receipt:
        from headway.quantization.receipt import Receipt

        printer.say(f"\nQuantized to {receipt['scheme']} by {receipt['method']}, measured on {receipt['data']}:")
        printer.table(Receipt.of(receipt).lines())
    if where:
        printer.say("\nLoads in:")
        printer.table((name, f"no: {reason}" if reason else "yes") for name, reason in where.items())
    printer.result(
        {
            "kind": config.kind,
            "family": family,
            "parameters": total,
            "weights_sha256": digest,
            "parameters_by_part": parts,
            "tensors": {name: [kind, *shape] for name, (kind, shape) in tensors.items()},
            "shapes": {name: list(shape) for name, _, shape, _ in rows},
            "cost": {name: value for name, (value, _) in costs.items()},
            "runtimes": where,
            "receipt": receipt,
            "config": config.model_dump(mode="json"),
        }
    )


class Subject(NamedTuple):
    """What is inspected: a config, and the model if there are weights."""

    config: ModelConfig
    loaded: Loaded | None
    notes: list[str]


def find(options: Options) -> Subject:
    """The model at PATH, or the config that a file or overrides describe. Raises ConfigError, InputError."""
    from headway.config import ModelConfig
    from headway.run_config import flatten, parse_overrides, put

    fields: dict[str, Any] = {}
    loaded: Loaded | None = None
    notes: list[str] = []
    if options.paths:
        path = Path(options.one_path("one model or config file"))
        if path.suffix in (".yaml", ".yml", ".json"):
            fields = _fields(path)
        else:
            from headway import api

            loaded = api.load(str(path), tower=options.tower)
            fields = loaded.config.model_dump(mode="json")
            notes = [f"step {loaded.step} of {path}"] if loaded.step is not None else []
            notes += [f"adapters on {loaded.base}"] if loaded.base else []
            notes += loaded.notes
    elif not options.overrides:
        raise ConfigError("PATH", "none", "a model, a config file, or fields", "headway inspect RUN")
    changes = {key.removeprefix("model."): value for key, value in parse_overrides(options.overrides).items()}
    for key, value in flatten(changes).items():
        put(fields, key, value)
    return Subject(ModelConfig(**fields), None if changes else loaded, notes)


def tensors_of(loaded: Loaded) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype or block format, shape) of every tensor, tied ones under their first name only."""
    from headway.nn.packed import PackedEmbedding, PackedLinear

    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    seen: set[int] = set()
    for name, tensor in loaded.model.named_parameters():
        out[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    for name, module in loaded.model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding) and module.get_buffer("codes0").data_ptr() not in seen:
            seen.add(module.get_buffer("codes0").data_ptr())
            out[f"{name}.weight"] = ("+".join(dict.fromkeys(module.kinds)), module.shape)
    return out


def _listed(tensors: dict[str, tuple[str, tuple[int, ...]]], *, whole: bool) -> list[tuple[str, ...]]:
    """Name, format, shape, number: layers that are alike as one line unless `whole`."""
    groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, (kind, shape) in tensors.items():
        general = name if whole else re.sub(r"\b(blocks|experts)\.\d+", r"\1.*", name)
        groups[general, kind, shape] = groups.get((general, kind, shape), 0) + 1
    return [
        (name, kind, " x ".join(map(str, shape)), f"{count} times" if count > 1 else "")
        for (name, kind, shape), count in groups.items()
    ]


def runtimes_of(loaded: Loaded) -> dict[str, str]:
    """{runtime: why it cannot load the model, empty where it can}."""
    from headway.runtimes import runtimes

    return runtimes(loaded)


def _fields(path: Path) -> dict[str, Any]:
    """The model fields of a YAML or JSON file: the file itself, or its `model` key."""
    from headway.plain_yaml import read_yaml

    tree, _ = read_yaml(path)
    if {"model_type", "architectures", "auto_map"} & set(tree):
        from headway.families import family_of
        from headway.families._translate import read_config

        described = read_config(family_of(tree, str(path)), tree, str(path))
        for line in described.notes:
            note(f"note: {line}")
        return described.config.model_dump(mode="json")
    if isinstance(tree.get("model"), dict):
        tree = tree["model"]
        if "depth" in tree:
            found = f"model.depth={tree['depth']}, from which the sizes follow once data and budget are known"
            raise ConfigError(str(path), found, "explicit sizes", "headway train --dry-run shows what it becomes")
    return tree


def _schema(printer: Printer) -> None:
    from headway.config import ModelConfig
    from headway.run_config import RunConfig
    from headway.strict import dump_json

    schema = ModelConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    run = RunConfig.model_json_schema()
    schema["$defs"] |= {**run.pop("$defs", {}), "RunConfig": run}
    print(dump_json(schema), flush=True)


def cost_of(config: ModelConfig, length: int) -> dict[str, tuple[float, str]]:
    """What a token costs: (value, unit) by name; weights and cache in float32."""
    from headway import cost

    forward = cost.forward_flops(config, length)
    out = {"forward_flops_per_token": (forward, "FLOP"), "training_flops_per_token": (3 * forward, "FLOP")}
    if config.kind in ("decoder", "encoder-decoder"):
        out |= {
            "cache_bytes_per_token": (cost.cache_bytes_per_token(config), "B"),
            "cache_bytes": (cost.cache_bytes(config, length), "B"),
            "bytes_read_per_decoded_token": (cost.decode_bytes(config, length), "B"),
        }
    return out


def shapes(config: ModelConfig, B: int, T: int) -> list[Row]:
    """(name, letters, sizes, meaning) of each tensor on the way through one block, in order.

    The first block of the decoder if there is one, else of the encoder. S = T: a whole sequence attends to itself.
    """
    D, N, K, H, F = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_ff
    ff, rows = config.feed_forward, list[Row]()
    norm = f"after {config.norm.type}" if config.placement != "post" else "as it comes"
    rows += [
        ("x", "BTD", (B, T, D), "the residual stream"),
        ("attention input", "BTD", (B, T, D), norm),
        ("qkv weight", "(N+2K)H D", ((N + 2 * K) * H, D), "queries, keys and values in one product"),
        ("q", "BTNH", (B, T, N, H), f"queries, {N} heads"),
        ("k", "BSKH", (B, T, K, H), f"keys, {K} heads: {_sharing(N, K)}"),
        ("v", "BSKH", (B, T, K, H), "values"),
        ("scores", "BNTS", (B, N, T, T), "q k / sqrt(H), masked; fused kernels never store it whole"),
        ("mixed", "BTNH", (B, T, N, H), "softmax(scores) v"),
        ("output weight", "D NH", (D, N * H), "back to the stream"),
        ("attention output", "BTD", (B, T, D), "added to x"),
    ]
    if config.attention.cross_every:
        rows.append(("cross k, v", "BSKH", (B, T, K, H), "from the encoder's states, computed once"))
    experts: tuple[int, ...] = (ff.experts.experts,) if ff.experts else ()
    letter = "E " if experts else ""
    up = 2 * F if ff.gated else F
    rows += [
        ("up weight", f"{letter}F D", (*experts, up, D), "gate and up" if ff.gated else "up"),
        ("hidden", "BTF", (B, T, F), f"{ff.activation}{' gate x up' if ff.gated else ''}"),
        (
            "down weight",
            f"{letter}D F",
            (*experts, D, F),
            f"{ff.experts.top_k} of {experts[0]} per token" if ff.experts else "",
        ),
        ("feed-forward output", "BTD", (B, T, D), "added to x"),
    ]
    if config.vocab_size and config.head.type in ("causal-lm", "masked-lm"):
        rows.append(("logits", "BTV", (B, T, config.vocab_size), "after the last block, norm and head"))
    return rows


def _sharing(N: int, K: int) -> str:
    return "one per query head" if N == K else f"each shared by {N // K} query heads"
