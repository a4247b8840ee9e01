"""CLIP and SigLIP as one folder with two towers: each against transformers' whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import headway
from headway.errors import InputError

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}
TEXT |= {"max_position_embeddings": 12, "eos_token_id": 60, "bos_token_id": 1, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 4}


def folder(kind: str, place: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
        model = CLIPModel(config).eval()
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VISION)).eval()
    model.save_pretrained(place)
    return model


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_towers(kind: str, tmp_path: Path) -> None:
    theirs = folder(kind, tmp_path)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 60
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        text = headway.load(tmp_path, tower="text").model(ids).logits
        image = headway.load(tmp_path, tower="vision").model(pixel_values=pixels).logits
        found = theirs.get_text_features(input_ids=ids), theirs.get_image_features(pixel_values=pixels)
    for one, other in zip((text, image), found, strict=True):
        expected = other if isinstance(other, torch.Tensor) else other.pooler_output
        assert (one - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("tower", [None, "audio"])
def test_a_tower_must_be_named(tower: str | None, tmp_path: Path) -> None:
    folder("clip", tmp_path)
    with pytest.raises(InputError, match="one of text, vision"):
        headway.load(tmp_path, tower=tower)
