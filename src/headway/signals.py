"""Images and recordings as a run's material: each set has two sides, labelled by its folders or its file."""

from __future__ import annotations

from functools import partial
from typing import Any

from headway import loading
from headway import run_config as rc
from headway.config import ModelConfig, Patch, with_fields
from headway.data.images import ImageSet, find_images
from headway.data.recordings import find_recordings
from headway.errors import ConfigError
from headway.material import Material, Where
from headway.training.pictures import ImageBatches, patch_of
from headway.training.recipe import Facts
from headway.training.recordings import RecordingBatches


def pictures(where: Where) -> Material:
    """Images in folders or IDX files. Raises ConfigError for another objective, or a model that sees other images."""
    run, d, base, teacher = where.run, where.run.data, where.base, where.teacher
    models = [config for config in (base and base.config, teacher and teacher.model.config) if config]
    sides = [patch.image for patch in (config.embeddings.patch for config in models) if patch]
    train, valid = find_images(str(d.path), d.valid_path, d.image or next(iter(sides), None), d.val_fraction)
    objective = run.objective or rc.ImageClassification()
    if not isinstance(objective, rc.ImageClassification | rc.MaskedPatches):
        found = f"{objective.type} for images ({d.path})"
        raise ConfigError("objective", found, "image-classification or masked-patches")
    names = train.names if isinstance(objective, rc.ImageClassification) else ()
    if teacher is not None:
        teacher.check_classes(names)
    where.say(f"{d.path}: {len(train.labels):,} images to train on, {len(valid.labels):,} held out")
    fields, config = _seeing(where, base, train, objective, len(names))
    patch = Patch(**fields["embeddings"]["patch"]) if config is None else config.embeddings.patch
    assert patch is not None

    def batches(side: ImageSet, model: ModelConfig) -> ImageBatches:
        return ImageBatches(side, objective, (model.embeddings.patch or patch).size)

    return Material(
        run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": names})}),
        None,
        Facts(len(train.labels) * patch.count, fields, len(train.labels), patch.count, config),
        (len(train.labels), len(valid.labels)),
        "images",
        lambda model, run: batches(train, model).shuffled(run.train.batch_size or 1, run.train.seed),
        lambda model, run: batches(valid, model).in_order(run.train.batch_size or 1, run.train.eval_rows),
        lambda model, rows, context: batches(train, model).shuffled(rows, 0).batch(0).inputs,
        base=base,
        teacher=teacher,
    )


def _seeing(
    where: Where,
    base: loading.Loaded | None,
    images: ImageSet,
    objective: rc.ImageClassification | rc.MaskedPatches,
    labels: int,
) -> tuple[dict[str, Any], ModelConfig | None]:
    """(what the images decide about a new model, the base's config with the head that the objective needs).

    Raises ConfigError for a base that sees other images.
    """
    _, channels, side, _ = images.pixels.shape
    is_class = isinstance(objective, rc.ImageClassification)
    head: dict[str, Any] = {"type": objective.type, **({"labels": labels, "pooling": "mean"} if is_class else {})}
    if base is None:
        size = where.run.data.patch or patch_of(side)
        patch = {"size": size, "image": side, "channels": channels, "first_token": False}
        vision = {"kind": "vision", "vocab_size": 0, "positions": "learned", "max_len": (side // size) ** 2}
        return {**vision, "embeddings": {"patch": patch}, "head": head}, None
    known, old = base.config.embeddings.patch, base.config.head
    name, found = str(where.run.base), f"images of {channels} x {side} x {side}"
    if known is None:
        raise ConfigError("base and data.path", f"{name} of kind {base.config.kind} for {found}", "a vision model")
    if (known.channels, known.image) != (channels, side) or where.run.data.patch not in (None, known.size):
        sees = f"{known.channels} x {known.image} x {known.image} in patches of {known.size}"
        fix = "leave out data.patch and data.image, or another base"
        raise ConfigError("base and data", f"{found} for {name}, which sees {sees}", "images of that size", fix)
    if is_class:
        head["pooling"] = getattr(old, "pooling", "first" if known.first_token else "mean")
    return {}, with_fields(base.config, head=head)


def recordings(where: Where) -> Material:
    """Recordings in folders, as spectrograms. Raises ConfigError for another objective or a published model."""
    run, d = where.run, where.run.data
    for key, name in (("base", run.base), ("distill.teacher", run.distill and run.distill.teacher)):
        if name is not None:
            raise ConfigError(key, f"a published model for recordings ({name})", "a new one", f"leave out {key}")
    objective = run.objective or rc.AudioClassification()
    if not isinstance(objective, rc.AudioClassification):
        found = f"{objective.type} for recordings ({d.path})"
        raise ConfigError("objective", found, "audio-classification", "objective=audio-classification")
    progress = partial(where.progress, "recordings")
    train, valid = find_recordings(str(d.path), d.valid_path, d.seconds, d.bins, d.val_fraction, progress)
    where.say(f"{d.path}: {len(train.labels):,} recordings to train on, {len(valid.labels):,} held out")
    frames = train.features.shape[2]
    positions = (frames + 1) // 2
    fields = {
        "kind": "encoder",
        "vocab_size": 0,
        "positions": "learned",
        "max_len": positions,
        "embeddings": {"audio": {"bins": d.bins, "frames": frames}},
        "head": {"type": "sequence-classification", "labels": len(train.names), "pooling": "mean"},
    }
    first, second = RecordingBatches(train, objective), RecordingBatches(valid, objective)
    return Material(
        run.model_copy(update={"objective": objective, "data": d.model_copy(update={"labels": train.names})}),
        None,
        Facts(len(train.labels) * positions, fields, len(train.labels), positions),
        (len(train.labels), len(valid.labels)),
        "recordings",
        lambda model, run: first.shuffled(run.train.batch_size or 1, run.train.seed),
        lambda model, run: second.in_order(run.train.batch_size or 1, run.train.eval_rows),
        lambda model, rows, context: first.shuffled(rows, 0).batch(0).inputs,
    )
