"""`headway quantize PATH DST`: a model in INT8 or INT4, and a receipt of what that cost."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headway.cli.opening import opened
from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, note, size
from headway.errors import ConfigError, DivergedError, InputError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from headway.api import Loaded
    from headway.cli.display import Display
    from headway.config import ModelConfig
    from headway.evaluation import Interval
    from headway.nn import Transformer
    from headway.quantization.receipt import Receipt
    from headway.quantization.walk import Scheme

_OWN_TEXT = "Python's documentation topics, which lie on every machine"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway quantize` takes: a model and where the smaller one goes."""

    to: Annotated[str, option(help="int8, int4, or a GGUF file: q8_0, q4_0, q4_1.")] = "int8"
    group: Annotated[int, option(min=32, help="Columns that share a scale: 32, 64 or 128.")] = 32
    asymmetric: Annotated[bool, option("--asymmetric", help="A minimum beside each scale, for INT4.")] = False
    method: Annotated[str | None, option(help="round, search, awq, smooth or gptq [gptq; 8 bits: round].")] = None
    data: Annotated[
        str | None, option(help="Text or images, for calibration and measure [Python's documentation].")
    ] = None
    calibration_tokens: Annotated[int, option(min=1, help="Tokens that calibration reads.")] = 16384
    measured_tokens: Annotated[int, option(min=2, help="Tokens that both models are measured on.")] = 8192
    context: Annotated[int, option(min=2, help="Tokens of a window, at most the model's max_len.")] = 512
    bound: Annotated[float, option(help="Nats a token, or 1 - cosine, above which nothing is kept.")] = 0.1
    quality: Annotated[float | None, option(help="Keep the cost below: as few layers as that needs get 8 bits.")] = None
    force: Annotated[bool, option("--force", help="Keep the file whatever it costs.")] = False
    overwrite: Annotated[bool, option("--overwrite", help="Replace what stands at DST.")] = False
    dtype: Annotated[str, option(help="stored, or float32 to round a model in codes a second time.")] = "stored"
    threads: Annotated[int | None, option(min=1, help="Threads of the CPU [torch's choice].")] = None
    device: Annotated[str, option(help="cpu.")] = "cpu"


def run(options: Options) -> None:
    """Load, calibrate, round, measure, and keep what is good enough."""
    options = by_name(options, "headway quantize")
    if len(options.paths) != 2:
        found = f"{len(options.paths)} paths"
        raise ConfigError("PATH", found, "a model and DST", "headway quantize PATH DST --to int4")
    scheme = _scheme(options)
    if options.quality is not None and scheme.blocks.bits > 4:
        raise ConfigError("--quality", f"--to {options.to}", "4 bits, of which it can make 8", "--to int4")
    method = options.method or ("gptq" if scheme.blocks.bits == 4 else "round")
    form = "gguf" if _is_gguf(options.to) else "headway"
    from dataclasses import replace

    from headway import files, saving
    from headway.cli.display import Display
    from headway.quantization.walk import METHODS, roles

    if method not in METHODS:
        raise ConfigError("--method", f"{method!r}{nearest(method, METHODS)}", ", ".join(METHODS))
    target = Path(options.paths[1])
    files.check_target(target, options.overwrite)
    loaded = opened(options.paths[0], options)
    roles(loaded.model)  # refuses a model in codes before any work
    if form == "gguf":
        saving.check_gguf(loaded)
    with Display() as display:
        small, paid = _made(loaded, scheme, method, options, display)
    printer = Printer(json=options.json)
    printer.table([*paid.lines(), ("weights", size(paid.bytes_before), f"before, {size(paid.bytes_after)} after")])
    _gate(paid, options)
    saving.save(replace(loaded, model=small, receipt=paid.as_json()), target, form, overwrite=options.overwrite)
    printer.say(f"{target}: {options.to} by {method}")
    printer.result({"path": str(target), "to": options.to, **paid.as_json()})


def _is_gguf(to: str) -> bool:
    from headway.checkpoints.gguf_model import FORMATS

    return to.upper() in FORMATS


def _scheme(options: Options) -> Scheme:
    from headway.quantization.walk import SCHEMES

    if options.to not in SCHEMES:
        raise ConfigError("--to", f"{options.to!r}{nearest(options.to, SCHEMES)}", ", ".join(SCHEMES))
    if options.group not in (32, 64, 128):
        raise ConfigError("--group", str(options.group), "32, 64 or 128")
    scheme = SCHEMES[options.to]
    if options.to != "int4" and options.asymmetric:
        raise ConfigError("--asymmetric", f"--to {options.to}", "--to int4")
    if _is_gguf(options.to):
        if options.group != 32:
            raise ConfigError("--group", str(options.group), f"32, which {options.to} has", "--to int4")
        if options.method in ("awq", "smooth"):
            expected = f"scales of inputs, for which {options.to} has no place"
            raise ConfigError("--method", f"{options.method} makes {expected}", "search, gptq or round", "--to int4")
        return scheme
    return scheme._replace(blocks=scheme.blocks._replace(group=options.group, symmetric=not options.asymmetric))


def _made(
    loaded: Loaded, scheme: Scheme, method: str, options: Options, display: Display
) -> tuple[Transformer, Receipt]:
    from headway.launch import Phase
    from headway.quantization.calibration import second_moments
    from headway.quantization.mixed import mixed
    from headway.quantization.receipt import compare, receipt, speeds
    from headway.quantization.walk import CALIBRATED, linear_layers, quantized

    is_calibrated = method in CALIBRATED
    first, last = _windows(loaded, options, needs_both=is_calibrated or options.quality is not None)
    moments = {}
    if first:
        moments = second_moments(
            loaded.model,
            linear_layers(loaded.model),
            first,
            lambda done: display(Phase("calibration", done, len(first))),
        )

    def rounded(scheme: Scheme, method: str) -> Transformer:
        given = moments if is_calibrated else None
        return quantized(loaded.model, scheme, method, given, lambda *done: display(Phase("rounding", *done)))

    small = rounded(scheme, method)
    to = options.to

    @functools.cache  # the mixture that was found has been measured
    def measured(model: Transformer) -> dict[str, Interval]:
        return compare(loaded.model, model, last, lambda done: display(Phase("measuring", done, len(last))))

    if options.quality is not None:
        large = rounded(scheme._replace(blocks=scheme.outer), "round")
        found = mixed(loaded.model, small, large, moments, lambda model: _cost(measured(model)), options.quality)
        small, to = found.model, f"{to}, {len(found.wide)} of {len(moments)} layers in 8 bits"
        note(f"8 bits: {', '.join(sorted(found.wide)) or 'no layer'}")
    speed = speeds(loaded.model, small, last, loaded.tokenizer)
    about = {"scheme": to, "method": method, "data": options.data or _OWN_TEXT}
    return small, receipt(loaded.model, small, measured(small), **about, speed=speed)


def _cost(figures: dict[str, Interval]) -> float:
    """Nats a token, or 1 - cosine."""
    return figures["loss_change"].value if "loss_change" in figures else 1 - figures["cosine"].value


Windows = list[dict[str, "Tensor"]]


def _windows(loaded: Loaded, options: Options, *, needs_both: bool) -> tuple[Windows, Windows]:
    """Windows to calibrate on, from the beginning of the text, and to measure on, from its end."""
    import torch

    config = loaded.config
    if config.embeddings.patch is not None:
        return _pictures(config, options)
    if loaded.model.is_pair and options.data is not None:
        return _pairs(loaded, options)
    if config.embeddings.audio is not None or not config.vocab_size:
        raise ConfigError("PATH", "a model that hears", "a model that reads text or sees images", "another PATH")
    context = min(options.context, config.max_len)
    wanted = options.calibration_tokens * needs_both + options.measured_tokens
    ids: list[int] = []
    for text in _texts(options.data):
        ids += loaded.words.encode(text)
        if options.data is None and len(ids) >= wanted:
            break
    whole = [ids[begin : begin + context] for begin in range(0, len(ids) - context + 1, context)]
    some = -(-options.measured_tokens // context)
    first, last = whole[:-some] if needs_both else [], whole[-some:]
    if not last or (needs_both and not first):
        found = f"{len(ids):,} tokens"
        raise InputError(
            options.data or "text", found, f"{2 * context:,} or more", f"--context {max(len(ids) // 4, 2)}"
        )
    if len(first) * context < options.calibration_tokens * needs_both:
        note(f"note: {len(first) * context:,} tokens to calibrate on, {options.calibration_tokens:,} asked for")
    first = first[: -(-options.calibration_tokens // context)]
    more = {"decoder_input_ids": torch.tensor([[config.tokens.decoder_start or 0]])} if loaded.model.is_pair else {}
    return tuple([{"input_ids": torch.tensor([window]), **more} for window in side] for side in (first, last))  # type: ignore[return-value]  # of two


def _pairs(loaded: Loaded, options: Options) -> tuple[Windows, Windows]:
    """Sources with the targets that the decoder reads: the first pairs to calibrate on, the last to measure."""
    from headway.data.encode import Coder, Losses
    from headway.data.examples import encode_all, gather
    from headway.data.forms import Pair, examples
    from headway.data.rows import find_tables, read_rows
    from headway.data.sources import ReadOptions, ReadReport
    from headway.training.tasks import TASKS, ExampleBatches

    assert options.data is not None
    how, report, task = ReadOptions(), ReadReport(), TASKS["seq2seq"]
    rows = (row for file in find_tables(options.data, how, report) for row in read_rows(file, how, report))
    found = list(examples(rows))
    if len(found) < 2 or not isinstance(found[0], Pair):
        raise InputError(options.data, f"{len(found)} rows", "two or more with source and target")
    longest = min(options.context, loaded.config.max_len)
    encoded = gather(encode_all(found, task.encode[Pair], Coder(loaded.words, longest, longest, (), False), Losses()))
    pad = loaded.words.pad_id
    batches = ExampleBatches(encoded, task, pad if pad is not None else loaded.words.eos_id or 0)
    sides: tuple[Windows, Windows] = ([], [])
    wanted = (options.calibration_tokens, options.measured_tokens)
    for side, some, tokens in zip(sides, (range(len(encoded)), reversed(range(len(encoded)))), wanted, strict=True):
        read = 0
        for number in itertools.islice(some, len(encoded) // 2):
            if read >= tokens:
                break
            side.append(batches.collate([number]))
            read += side[-1]["labels"].numel()
    return sides


_IMAGES = 16  # of a batch


def _pictures(config: ModelConfig, options: Options) -> tuple[Windows, Windows]:
    """Images to calibrate on, from a set's training side, and to measure on, from the side that is held out.

    They are spread over their side, so that all classes count; as many as their patches make the tokens asked for.
    """
    import numpy as np

    from headway.data.images import find_images
    from headway.run_config import ImageClassification
    from headway.training.pictures import ImageBatches

    patch = config.embeddings.patch
    assert patch is not None
    if options.data is None:
        found = f"a model of kind {config.kind}"
        raise ConfigError("--data", f"missing, for {found}", "a folder of images to measure on", "--data IMAGES")
    out, sides = [], find_images(options.data, None, patch.image, 0.1)
    for images, tokens in zip(sides, (options.calibration_tokens, options.measured_tokens), strict=True):
        count = min(-(-tokens // patch.count), len(images.labels))
        places = np.linspace(0, len(images.labels) - 1, count).astype(int)
        batches = ImageBatches(images, ImageClassification(), patch.size)
        groups = [places[begin : begin + _IMAGES].tolist() for begin in range(0, count, _IMAGES)]
        out.append([{"pixel_values": batches.collate(group, None)["pixel_values"]} for group in groups])
    return out[0], out[1]


def _texts(data: str | None) -> Iterable[str]:
    if data is not None:
        from headway.data import documents

        return (document.text for document in documents(data))
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _gate(paid: Receipt, options: Options) -> None:
    """Refuse what costs more than the bound. Raises DivergedError (exit 5)."""
    figures, cost = paid.figures, _cost(paid.figures)
    bound = options.bound if options.quality is None else options.quality
    if cost <= bound or options.force:
        return
    before = (
        f", from {figures['loss_before'].value:.4f} to {figures['loss_after'].value:.4f}" if "kl" in figures else ""
    )
    fix = "--method gptq, --group 32, --to int8, or --force to keep it"
    raise DivergedError("quality", f"{options.to} costs {cost:.4f}{before}", f"at most {bound}", fix)
