"""Folders that hold two models side by side, a text and a vision tower (CLIP, SigLIP): each is loaded alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headway.checkpoints.hub_folder import CONFIG, Tensors, open_tensors
from headway.errors import InputError


class Tower(NamedTuple):
    """One tower: its model_type and class, what its tensors begin with, and what is cut off that to give its own names.

    `shared` are keys that hold for both, whatever a tower's own config says.
    """

    model_type: str
    architecture: str
    starts: tuple[str, ...]
    cut: str = ""
    shared: tuple[str, ...] = ()


TOWERS: dict[str, dict[str, Tower]] = {
    "clip": {
        "text": Tower(
            "clip_text_model",
            "CLIPTextModelWithProjection",
            ("text_model.", "text_projection."),
            shared=("projection_dim",),
        ),
        "vision": Tower(
            "clip_vision_model",
            "CLIPVisionModelWithProjection",
            ("vision_model.", "visual_projection."),
            shared=("projection_dim",),
        ),
    },
    "siglip": {
        "text": Tower("siglip_text_model", "SiglipTextModel", ("text_model.",), "text_model."),
        "vision": Tower("siglip_vision_model", "SiglipVisionModel", ("vision_model.",), "vision_model."),
    },
}


def open_tower(folder: Path, raw: Mapping[str, Any], which: str | None) -> tuple[dict[str, Any], Tensors]:
    """The config and tensors of one tower. Raises InputError: none named, another name, no config of its own."""
    where = str(folder / CONFIG)
    towers = TOWERS[raw["model_type"]]
    if which not in towers:
        found = f"{raw['model_type']} holds {len(towers)} models" + (f", none called {which!r}" if which else "")
        raise InputError(where, found, f"one of {', '.join(towers)}", "--tower text, or load(path, tower='text')")
    tower = towers[which]
    own = raw.get(f"{which}_config")
    if not isinstance(own, dict):
        raise InputError(f"{where} {which}_config", "missing", "the config of that tower")
    config = own | {key: raw[key] for key in tower.shared if key in raw}
    config |= {"model_type": tower.model_type, "architectures": [tower.architecture]}
    whole = open_tensors(folder)
    return config, whole.only({name: name.removeprefix(tower.cut) for name in whole if name.startswith(tower.starts)})
