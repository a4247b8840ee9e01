"""`headway convert SRC DST --to hf|gguf|headway`: the same model in another form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from headway.cli.options import Common, by_name, option
from headway.cli.output import Printer, note, size
from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.loading import Loaded


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What `headway convert` takes."""

    to: Annotated[
        str | None, option(help="hf (a folder), gguf (a file), headway (a run folder), or peft (its adapter).")
    ] = None
    merge: Annotated[bool, option("--merge", help="Take the adapters into the weights.")] = False
    dtype: Annotated[
        str | None, option(help="float32, float16, bfloat16; for gguf also q8_0, q4_0, q4_1 [as stored].")
    ] = None
    tower: Annotated[str | None, option(help="text or vision, of a folder that holds both (CLIP, SigLIP).")] = None
    family: Annotated[str | None, option(help="The model_type to write it as [its own].")] = None
    overwrite: Annotated[bool, option("--overwrite", help="Replace what stands at DST.")] = False
    allow_nonfinite: Annotated[bool, option("--allow-nonfinite", help="Accept NaN and infinity.")] = False
    unsafe_pickle: Annotated[bool, option("--unsafe-pickle", help="Read pytorch_model.bin, in a confined process.")] = (
        False
    )


def run(options: Options) -> None:
    """Load, write, say where."""
    options = by_name(options, "headway convert")
    if len(options.paths) != 2:
        raise ConfigError("PATH", f"{len(options.paths)} paths", "SRC and DST", "headway convert SRC DST --to hf")
    source, target = map(Path, options.paths)
    form = options.to or ("gguf" if target.suffix == ".gguf" else None)
    if form is None:
        raise ConfigError("--to", "missing", "hf, gguf or headway")
    from headway import loading, saving
    from headway.checkpoints.fetch import resolve

    source = resolve(str(source))
    if options.unsafe_pickle or loading.is_container(source):
        given = {"unsafe_pickle": options.unsafe_pickle, "allow_nonfinite": options.allow_nonfinite}
        loaded = loading.load_container(source, **given)
    else:
        # Merged weights are new ones: those in codes are unpacked for it, and put in codes again where DST wants it.
        dtype = "float32" if options.merge else None
        loaded = loading.load(source, dtype=dtype, allow_nonfinite=options.allow_nonfinite, tower=options.tower)
    for line in loaded.notes:
        note(f"note: {line}")
    saving.save(
        loaded,
        target,
        form,
        dtype=options.dtype,
        family=options.family,
        overwrite=options.overwrite,
        merge=options.merge,
    )
    printer = Printer(json=options.json)
    rounding = (
        _rounding(loaded, target, printer) if options.merge and options.dtype not in (None, *loading.DTYPES) else {}
    )
    parts = [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]
    held = sum(file.stat().st_size for file in parts)
    printer.say(f"{target}: {form}, {size(held)}")
    family = loaded.family if form in ("headway", "peft") else saving.family_for(loaded, options.family)[0].model_type
    printer.result({"path": str(target), "form": form, "family": family, "bytes": held, **rounding})


def _rounding(merged: Loaded, target: Path, printer: Printer) -> dict[str, object]:
    """What putting merged weights in codes cost: they were trained beside others."""
    from headway import loading
    from headway.evaluation.agreement import agree

    rows = {row.name: row for row in agree(merged, loading.load(target), max_tokens=8).rows}
    kl, same = rows["logits"].figures.get("mean_kl"), rows["top-1"].figures.get("agreement")
    printer.say(f"against the merged weights in float32: mean KL {kl:.4g} nats, the same first choice in {same:.1%}")
    printer.say("nothing is rounded by --dtype float16, or by --to peft beside the base as it is")
    return {"mean_kl": kl, "agreement": same}
