"""The walk: every matrix of a model that takes part in products, put in codes of a few bits.

    moments = second_moments(loaded.model, linear_layers(loaded.model), batches)
    small = quantized(loaded.model, SCHEMES["int4"], "gptq", moments)

What a layer becomes depends on its role alone, so that the walk knows every family: the products of attention and of
feed-forwards take the scheme's `blocks`, token tables and the layer that makes logits its `outer`. Norms, biases,
positions, routers of experts and small heads stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from headway.errors import ConfigError
from headway.kernels.codes import Codes, lay_out
from headway.nn import Transformer
from headway.nn.heads import LanguageModelHead
from headway.nn.packed import Packed, PackedEmbedding, PackedLinear, check_plain
from headway.quantization import scaling
from headway.quantization.calibration import Moments
from headway.quantization.compensation import compensated
from headway.quantization.rounding import Grid, check_matrix, round_to, steps_of


class Scheme(NamedTuple):
    """What the products of the blocks become, and what token tables and the layer before the logits."""

    blocks: Grid
    outer: Grid


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(Grid(8, 32), Grid(8, 32)),
    "int4": Scheme(Grid(4, 32), Grid(8, 32)),
    "q8_0": Scheme(Grid(8, 32), Grid(8, 32)),
    "q4_0": Scheme(Grid(4, 32), Grid(8, 32)),
    "q4_1": Scheme(Grid(4, 32, symmetric=False), Grid(8, 32)),
}
"""The last three are what GGUF has formats for: token tables and the layer before the logits are Q8_0 there."""
METHODS = ("round", "search", "awq", "smooth", "gptq")
"""Plain rounding; a search of scales; AWQ; SmoothQuant; GPTQ. All but the first look at second moments."""
CALIBRATED = METHODS[1:]
SHARE = 0.5  # SmoothQuant's alpha
_ROLES = {
    re.compile(r"(encoder|decoder)\..*\b(qkv|q|kv|output|up|down)"): "blocks",
    re.compile(r"(decoder_)?embeddings\.tokens|head\.(output|dense)"): "outer",
}


def roles(model: Transformer) -> dict[str, str]:
    """{layer: `blocks` or `outer`} of all that the walk takes. Raises ConfigError for a model in codes (Q10)."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            found = f"{name} is in {'+'.join(dict.fromkeys(module.kinds))} already"
            raise ConfigError("PATH", found, "a model in floats", "--dtype float32 rounds it a second time")
        role = next((role for pattern, role in _ROLES.items() if pattern.fullmatch(name)), None)
        is_kept = name.startswith("head.") and not isinstance(model.head, LanguageModelHead)
        if isinstance(module, nn.Linear | nn.Embedding) and role is not None and not is_kept:
            out[name] = role
    return out


def linear_layers(model: Transformer, role: str = "blocks") -> list[str]:
    """The layers of a role that multiply, whose inputs calibration looks at."""
    named = [name for name, found in roles(model).items() if found == role]
    return [name for name in named if isinstance(model.get_submodule(name), nn.Linear)]


def quantized(
    model: Transformer,
    scheme: Scheme | Mapping[str, Grid | None],
    method: str,
    moments: Mapping[str, Moments] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """A model of the same weights in codes; what the walk leaves alone is shared with the old one.

    Args:
        scheme: of all layers, or {name: its grid, None to leave it in floats}.
        method: one of METHODS; a layer without moments gets a search in which all columns count alike.
        progress: told (layers done, layers).

    Raises ConfigError: unknown method, a model in codes already. InputError: weights without an image in codes (Q9).
    """
    if method not in METHODS:
        raise ConfigError("--method", repr(method)[:80], ", ".join(METHODS))
    check_plain(model)
    chosen = roles(model)
    grids = {name: getattr(scheme, role) for name, role in chosen.items()} if isinstance(scheme, Scheme) else scheme
    done: dict[int, Packed] = {}  # by the place of the weights: what is tied stays tied
    for number, name in enumerate(chosen, 1):
        matrix, grid = model.get_submodule(name).weight, grids[name]
        assert isinstance(matrix, Tensor)
        if grid is not None and matrix.data_ptr() not in done:
            check_matrix(matrix, f"{name}.weight")
            done[matrix.data_ptr()] = in_codes(matrix.detach().float(), grid, method, (moments or {}).get(name))
        progress(number, len(chosen))
    state = model.state_dict()  # a table stands in it under each of its names
    weights: dict[str, Tensor | Packed] = {name: done.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}
    return Transformer.of(model.config, weights)


def in_codes(matrix: Tensor, grid: Grid, method: str, moments: Moments | None) -> Packed:
    """One matrix (R, C) by a method."""
    scale = None
    if moments is None:
        codes = round_to(matrix, grid, steps_of(matrix, grid, searched=method != "round" and grid.bits < 8))
    elif method == "gptq":
        codes = compensated(matrix, moments.products, grid)
    elif method in ("awq", "smooth"):
        sizes = moments.squares.sqrt()
        is_awq = method == "awq"
        scale = scaling.searched(matrix, moments, grid) if is_awq else scaling.balanced(matrix, sizes, SHARE)
        codes = _important(matrix * scale, grid, moments.squares / scale**2, searched=grid.bits < 8)
    else:
        codes = _important(matrix, grid, moments.squares, searched=method == "search" and grid.bits < 8)
    return packed(codes, grid, None if scale is None else 1 / scale)


def _important(matrix: Tensor, grid: Grid, importance: Tensor, *, searched: bool) -> Codes:
    return round_to(matrix, grid, steps_of(matrix, grid, searched=searched, importance=importance))


def packed(codes: Codes, grid: Grid, input_scale: Tensor | None = None) -> Packed:
    """Codes row by row as a matrix that kernels read."""
    coded = lay_out(codes, grid.bits, min(grid.group, 32), grid.group).settled()
    kind = f"INT{grid.bits}/{grid.group}{'' if grid.symmetric else ' with minima'}"
    return Packed(((kind, coded),), coded.shape, input_scale)


def size_of(model: nn.Module) -> int:
    """Bytes of all weights, tied ones once."""
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())
