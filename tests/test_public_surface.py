"""What users and checkpoints rely on, frozen: flags, config keys, weight names. A change is a visible diff.

After a deliberate change: python tests/test_public_surface.py > tests/public_surface.txt
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import torch

import headway
from headway.cli.main import VERBS
from headway.config import ModelConfig
from headway.nn import Transformer
from headway.run_config import RunConfig, flatten

FROZEN = Path(__file__).with_name("public_surface.txt")
SIZES = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 11, "max_len": 8}
MODELS = {
    "decoder": {},
    "decoder, all options": {
        "attention": {"qk_norm": "rmsnorm", "bias": True, "output_bias": True},
        "norm": "layernorm",
        "placement": "sandwich",
        "positions": "relative",
        "feed_forward": {"activation": "silu", "gated": True, "bias": True, "experts": {"experts": 2}},
        "embeddings": {"norm": True},
    },
    "encoder": {"kind": "encoder", "embeddings": {"token_types": 2}, "positions": "learned", "placement": "post"},
    "encoder-decoder": {"kind": "encoder-decoder", "positions": "learned"},
    "vision": {"kind": "vision", "vocab_size": 0, "max_len": 5, "embeddings": {"patch": {"size": 4, "image": 8}}},
}


def surface() -> Iterator[str]:
    yield "# headway"
    yield from sorted(headway.__all__)
    for verb in VERBS:
        yield f"\n# headway {verb}"
        options = importlib.import_module(f"headway.cli.{verb}").Options
        hints = get_type_hints(options, include_extras=True)
        flags = []
        for field in dataclasses.fields(options):
            hint = hints[field.name]
            assert get_origin(hint) is Annotated
            info = get_args(hint)[1]
            names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
            flags.append(" ".join(names) if names else f"--{field.name.replace('_', '-')}")
        yield from sorted(flag for flag in flags if flag != "--words")
    yield "\n# keys of a run"
    yield from flatten(RunConfig().model_dump(mode="json"))
    for name, fields in MODELS.items():
        yield f"\n# weights: {name}"
        with torch.device("meta"):
            state = Transformer(ModelConfig(**{**SIZES, **fields})).state_dict()
        yield from (f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in sorted(state.items()))


def test_the_public_surface_is_as_written():
    assert "\n".join(surface()) + "\n" == FROZEN.read_text(encoding="utf-8"), __doc__


if __name__ == "__main__":
    print("\n".join(surface()))
