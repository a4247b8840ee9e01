"""Models from other containers as Hugging Face models: which tensor is which, and the config that the shapes tell.

The tables are the data: ONNX names and CTranslate2 names on the left, published names on the right (huggingface.co
facebook/dinov2-small and openai/whisper-tiny.en; OpenNMT/CTranslate2, python/ctranslate2/converters/transformers.py).
What comes out goes through `families` like any other folder. Left out: other exports, quantized CTranslate2 models.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.checkpoints.ctranslate2 import Ct2File, read_ctranslate2
from headway.checkpoints.onnx import OnnxFile, read_onnx
from headway.checkpoints.raw import looks_like_pickle
from headway.errors import InputError
from headway.files import open_regular, read_bytes
from headway.strict import field, strict_json

Config = dict[str, Any]
Tensors = dict[str, Tensor]
MAX_JSON = 1 << 26
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "preprocessor_config.json"),
)

# --- DINOv2 in ONNX. The exporter keeps the names of what it passes on and folds what it can compute: the transpose of
# --- each linear layer (taken by the MatMul of the layer's name) and the two parts of the position embeddings.
DINOV2_PATCHES = "embeddings.patch_embeddings.projection.weight"
DINOV2_PARTS = ("embeddings.", "encoder.", "layernorm.")
DINOV2_POSITIONS = ("Concat", "Reshape")  # whose first input is the class token's part, and the patches' part
DINOV2_HEADS = "encoder/layer.0/attention/attention/Concat"  # takes n_heads and d_head as constants
DINOV2_EPS = "encoder/layer.0/norm1/Add"

# --- Whisper in CTranslate2: projections of one input are stored as one. Keys have no bias: theirs must be zeros.
WHISPER = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/position_encodings": "encoder.embed_positions",
    "encoder/layer_norm": "encoder.layer_norm",
    "decoder/embeddings": "decoder.embed_tokens",
    "decoder/position_encodings": "decoder.embed_positions",
    "decoder/layer_norm": "decoder.layer_norm",
}
WHISPER_LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
WHISPER_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
WHISPER_FIXED = {  # what the published architecture is; activation 3 is GELU (specs/common_spec.py)
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
WHISPER_UNUSED = {"decoder/alignment_heads", "decoder/alignment_layer"}
WHISPER_ENGLISH = 51_864  # tokens of an English-only model; the others have a token more per language added
_LAYER = re.compile(r"(encoder|decoder)/layer_(0|[1-9]\d{0,3})/(.+)")


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def read_foreign(path: Path, *, say: Callable[[str], None] = _on_stderr) -> tuple[Config, Tensors, dict[str, Path]]:
    """A model from an ONNX file or a CTranslate2 folder as if it lay in a Hugging Face folder.

    Args:
        path: an `.onnx` file with a DINOv2 backbone, or a CTranslate2 Whisper model: its folder or its `model.bin`.
        say: told in one line which tensors have no place in the result.

    Returns:
        config.json as a dict; tensors by their published names, views of the file where possible; the tokenizer's
        files that lie beside it, by name.

    Raises:
        InputError: naming the file and what is wrong: see `read_onnx`, `read_ctranslate2`; not a known model.
    """
    path = path / "model.bin" if path.is_dir() else path
    with open_regular(path) as file:
        head = file.read(64)
    if looks_like_pickle(head):
        fix = f"headway convert --unsafe-pickle {path} DST"
        raise InputError(str(path), "a pickle, which can run code", "an ONNX or CTranslate2 model", fix)
    files = {name: path.parent / name for name in TOKENIZER_FILES if (path.parent / name).is_file()}
    if int.from_bytes(head[:4], "little") < 256:  # CTranslate2 begins with a small version, ONNX with a field's key
        config, tensors = _whisper(read_ctranslate2(path), path)
        return config, tensors, files
    config, tensors, left = _dinov2(read_onnx(path), str(path))
    if left:
        say(f"{path}: left out {len(left)} tensors that belong to no DINOv2 backbone: {', '.join(left)}"[:2000])
    return config, tensors, files


def _sizes(tensors: Tensors, name: str, dims: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with `dims` sizes of 1 or more."""
    if name not in tensors:
        raise InputError(where, f"no tensor {name}", "all tensors of the architecture")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise InputError(where, f"tensor {name} of shape {list(shape)}", f"{dims} sizes of 1 or more")
    return shape


def _dtype(tensors: Tensors, name: str) -> str:
    return str(tensors[name].dtype).removeprefix("torch.")


def _count(tensors: Tensors, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


# --- DINOv2 ------------------------------------------------------------------------------------------------------


def _dinov2(file: OnnxFile, where: str) -> tuple[Config, Tensors, list[str]]:
    """Config, tensors, and the names of the initializers that are not the backbone's."""
    prefix = next((name.removesuffix(DINOV2_PATCHES) for name in file.tensors if name.endswith(DINOV2_PATCHES)), None)
    if prefix is None:
        raise InputError(where, f"no tensor {DINOV2_PATCHES}", "an ONNX export of a DINOv2 model")
    place = "/" + prefix.replace(".", "/")
    parts = tuple(prefix + part for part in DINOV2_PARTS)
    taken = {name: name.removeprefix(prefix) for name in file.tensors if name.startswith(parts)}
    tensors = {published: file.tensors[name] for name, published in taken.items()}
    positions: dict[str, Tensor] = {}
    for node in file.nodes:
        first, second = (*node.inputs, "", "")[:2]
        if not node.name.startswith(place):
            continue
        if node.op == "MatMul" and second in file.tensors:
            name = node.name.removeprefix(place).removesuffix("/MatMul").replace("/", ".") + ".weight"
            taken[second], tensors[name] = name, file.tensors[second]
            _sizes(tensors, name, 2, where)
            tensors[name] = tensors[name].T
        elif node.op in DINOV2_POSITIONS and first in file.tensors and first not in taken:
            taken[first] = f"embeddings.position_embeddings by {node.op}"
            positions[taken[first]] = file.tensors[first]
    d_model = _sizes(tensors, DINOV2_PATCHES, 4, where)[0]
    both = [f"embeddings.position_embeddings by {op}" for op in DINOV2_POSITIONS]
    for name in both:
        shape = _sizes(positions, name, 3, where)
        if shape[0] != 1 or shape[2] != d_model:
            raise InputError(where, f"tensor {name} of shape {list(shape)}", f"1 x positions x {d_model}")
    tensors["embeddings.position_embeddings"] = torch.cat([positions[name] for name in both], 1)
    left = sorted(set(file.tensors) - set(taken))
    return _dinov2_config(file, tensors, place, where), tensors, left


def _numbers(file: OnnxFile, node_name: str) -> list[int | float]:
    """The constants among what a node takes."""
    made = {
        node.outputs[0]: node.attributes.get("value") for node in file.nodes if node.op == "Constant" and node.outputs
    }
    inputs = next((node.inputs for node in file.nodes if node.name == node_name), ())
    found = [value for name in inputs if isinstance(value := made.get(name), Tensor) and value.numel() == 1]
    return [value.item() for value in found]


def _dinov2_config(file: OnnxFile, tensors: Tensors, place: str, where: str) -> Config:
    d_model, channels, patch, other = _sizes(tensors, DINOV2_PATCHES, 4, where)
    grid = math.isqrt(_sizes(tensors, "embeddings.position_embeddings", 3, where)[1] - 1)
    d_ff = _sizes(tensors, "encoder.layer.0.mlp.fc1.weight", 2, where)[0]
    heads, eps = _numbers(file, place + DINOV2_HEADS), _numbers(file, place + DINOV2_EPS)
    if patch != other or 1 + grid * grid != tensors["embeddings.position_embeddings"].shape[1] or d_ff % d_model:
        raise InputError(where, "patches, positions or feed-forward sizes that fit no DINOv2", "square ones")
    if len(heads) != 2 or min(heads) < 1 or math.prod(heads) != d_model or len(eps) != 1 or not 0 < eps[0] < 1:
        raise InputError(where, f"heads {heads}, epsilon {eps} in the graph", f"heads x size = {d_model}, one epsilon")
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": d_model,
        "num_hidden_layers": _count(tensors, r"encoder\.layer\.\d+\.norm1\.weight"),
        "num_attention_heads": int(heads[0]),
        "mlp_ratio": d_ff // d_model,
        "hidden_act": "gelu",
        "layer_norm_eps": float(f"{eps[0]:.6g}"),  # stored as float32
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in tensors,
        "use_swiglu_ffn": False,
        "use_mask_token": "embeddings.mask_token" in tensors,
        "dtype": _dtype(tensors, DINOV2_PATCHES),
    }


# --- Whisper -----------------------------------------------------------------------------------------------------


def _whisper(file: Ct2File, path: Path) -> tuple[Config, Tensors]:
    where = str(path)
    if file.spec != "WhisperSpec":
        raise InputError(where, f"a model of specification {file.spec[:40]!r}", "WhisperSpec")
    tensors: Tensors = {}
    numbers: dict[str, int] = {}
    for name, value in file.tensors.items():
        if value.dim() or value.is_floating_point():
            tensors |= _whisper_parts(name, value, where)
        else:
            numbers[name] = int(value)
    for name, number in numbers.items():
        if number != WHISPER_FIXED.get(name, number):
            raise InputError(where, f"{name} is {number}", f"{WHISPER_FIXED[name]}, as in the published architecture")
    unknown = numbers.keys() - WHISPER_FIXED.keys() - WHISPER_UNUSED - {"encoder/num_heads", "decoder/num_heads"}
    if unknown:
        raise InputError(where, f"unknown number {min(unknown)[:80]!r}", "a Whisper model")
    return _whisper_config(tensors, numbers, path), tensors


def _whisper_parts(name: str, value: Tensor, where: str) -> Tensors:
    """The published tensors that one variable holds."""
    scope, _, leaf = name.rpartition("/")
    layer = _LAYER.fullmatch(scope)
    if layer:
        targets = [f"{layer[1]}.layers.{layer[2]}.{part}" for part in WHISPER_LAYER.get(layer[3], ())]
    else:
        targets = [WHISPER[scope]] if scope in WHISPER else []
    known = targets and leaf in WHISPER_LEAVES
    if not known or not value.dim() or not value.numel() or len(value) % len(targets):
        fix = "convert the model without quantization (--quantization float16)" * name.endswith("_scale")
        raise InputError(where, f"tensor {name[:80]!r} of shape {list(value.shape)}", "a Whisper model's", fix)
    parts = {}
    for target, part in zip(targets, value.chunk(len(targets)), strict=True):
        if len(targets) > 1 and leaf == "bias" and target.endswith("k_proj"):
            if part.any():
                raise InputError(where, f"tensor {name[:80]!r} biases the keys", "zeros there")
            continue
        parts[f"model.{target}.{WHISPER_LEAVES[leaf]}"] = part
    return parts


def _whisper_config(tensors: Tensors, numbers: Mapping[str, int], path: Path) -> Config:
    where = str(path)
    d_model, mels, _ = _sizes(tensors, "model.encoder.conv1.weight", 3, where)
    vocab_size, _ = _sizes(tensors, "model.decoder.embed_tokens.weight", 2, where)
    config: Config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "activation_function": "gelu",
        "d_model": d_model,
        "num_mel_bins": mels,
        "vocab_size": vocab_size,
        "max_source_positions": _sizes(tensors, "model.encoder.embed_positions.weight", 2, where)[0],
        "max_target_positions": _sizes(tensors, "model.decoder.embed_positions.weight", 2, where)[0],
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "dtype": _dtype(tensors, "model.encoder.conv1.weight"),
    }
    for side in ("encoder", "decoder"):
        heads = numbers.get(f"{side}/num_heads", 0)
        if heads < 1 or d_model % heads:
            raise InputError(where, f"{side}/num_heads {heads}", f"a divisor of {d_model}")
        config[f"{side}_attention_heads"] = heads
        config[f"{side}_layers"] = _count(tensors, rf"model\.{side}\.layers\.\d+\.fc1\.weight")
        config[f"{side}_ffn_dim"] = _sizes(tensors, f"model.{side}.layers.0.fc1.weight", 2, where)[0]
    return config | _whisper_tokens(path.parent, vocab_size)


def _whisper_tokens(folder: Path, vocab_size: int) -> Config:
    """Special ids by the names that the tokenizer gives them, suppressed ids from CTranslate2's config."""
    where = str(folder / "tokenizer.json")
    rows = _list(_json(folder / "tokenizer.json"), "added_tokens", where)
    ids = {str(row.get("content")): row.get("id") for row in rows if isinstance(row, dict)}
    end, start, plain = (_id(ids.get(f"<|{name}|>"), vocab_size, f"{where} <|{name}|>")
                         for name in ("endoftext", "startoftranscript", "notimestamps"))  # fmt: skip
    config: Config = {f"{name}_token_id": end for name in ("bos", "eos", "pad")} | {"decoder_start_token_id": start}
    if vocab_size == WHISPER_ENGLISH:  # with many languages, what follows the start is the caller's choice
        config["forced_decoder_ids"] = [[1, plain]]
    where = str(folder / "config.json")
    ours = _json(folder / "config.json") if (folder / "config.json").exists() else {}
    for theirs, published in (("suppress_ids", "suppress_tokens"), ("suppress_ids_begin", "begin_suppress_tokens")):
        config[published] = [_id(value, vocab_size, f"{where} {theirs}") for value in _list(ours, theirs, where)]
    return config


def _json(path: Path) -> object:
    return strict_json(read_bytes(path, MAX_JSON), str(path))


def _list(data: object, key: str, where: str) -> list[object]:
    """The list of a key; empty where the key is missing."""
    value = field(data, key, (list, type(None)), where)
    return value if isinstance(value, list) else []


def _id(value: object, vocab_size: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < vocab_size:
        raise InputError(where, f"token id {str(value)[:20]}", f"0 to {vocab_size - 1}")
    return value
