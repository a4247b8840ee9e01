"""The parts of a Transformer as their papers write them: numpy, float64, explicit loops where an index could slip.

Nothing here imports a computation from headway; the modules are read for their weights only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
Visible = Callable[[int, int, int], bool]  # (row, query column, key column) -> visible

# Sums of at most a few hundred terms of size 1: float32 keeps 6e-8 of each, float64 1e-16.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def wide(x: Tensor) -> Array:
    """As float64 numpy."""
    return x.detach().double().numpy()


def assert_close(found: Tensor, expected: Array, real: Tensor | None = None) -> None:
    """Within the dtype's tolerance of the values' scale, at the positions (B, T) that are real."""
    assert found.shape == expected.shape
    error = np.abs(wide(found) - expected)
    assert np.isfinite(error).all()
    worst = error.max() if real is None else error[real.numpy()].max()
    assert worst < TOLERANCE[found.dtype] * max(1.0, np.abs(expected).max())


def randomize(module: nn.Module, spread: float = 0.6) -> Any:
    """Every parameter drawn at random, so that no norm is the identity and no branch is zero; in eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(float(parameter.ndim == 1), spread)
    return module.eval()


def softmax(row: Array) -> Array:
    """Of scores in which -inf means hidden; nothing visible, no weight."""
    if np.isinf(row).all():
        return np.zeros_like(row)
    raised = np.exp(row - row.max())
    return raised / raised.sum()


def everything(b: int, t: int, s: int) -> bool:
    """The mask that hides nothing."""
    return True


def causal(b: int, t: int, s: int) -> bool:
    """A key at or before the query."""
    return s <= t


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    visible: Visible = everything,
    *,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """softmax(softcap(scale q k^T) + bias) v, one query of one head of one row at a time.

    (B, T, N, H), (B, S, K, H), bias (B, N, T, S) -> (B, T, N, H). Query head n reads key-value head n // (N / K)
    (arXiv:2305.13245, figure 2).
    """
    rows, T, N, _ = q.shape
    S, K = k.shape[1:3]
    out = np.zeros((rows, T, N, v.shape[-1]))
    seen = np.array([[[visible(b, t, s) for s in range(S)] for t in range(T)] for b in range(rows)])
    for b, t, n in itertools.product(range(rows), range(T), range(N)):
        kv = n // (N // K)
        scores = scale * (k[b, :, kv] @ q[b, t, n])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[b, n, t]
        out[b, t, n] = softmax(np.where(seen[b, t], scores, -np.inf)) @ v[b, :, kv]
    return out


def linear(x: Array, layer: nn.Linear) -> Array:
    """x W^T + b."""
    out = x @ wide(layer.weight).T
    return out if layer.bias is None else out + wide(layer.bias)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """arXiv:1607.06450, equations 3 and 4."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    out = (x - mean) / np.sqrt(variance + eps) * weight
    return out if bias is None else out + bias


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """arXiv:1910.07467, equation 4, with the eps of every implementation."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotated(x: Array, layout: str) -> Array:
    """RoPE as multiplication by exp(i t theta^(-2j/H)) (arXiv:2104.09864, equation 12). (B, T, N, H)."""
    size = x.shape[-1]
    if layout == "interleaved":
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, size // 2), slice(size // 2, None)
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)[None, :, None]
    out = np.empty_like(x)
    out[..., first], out[..., second] = z.real, z.imag
    return out


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(x),  # arXiv:1606.08415
    "gelu-tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick-gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,  # arXiv:2109.08668
}


def feed_forward(x: Array, layer: Any, activation: str, gated: bool) -> Array:
    """down(act(up x)), or down(act(gate x) * up x) with the gate's rows first (arXiv:2002.05202, equation 6)."""
    hidden = linear(x, layer.up)
    if not gated:
        return linear(ACTIVATIONS[activation](hidden), layer.down)
    gate, product = np.split(hidden, 2, -1)
    return linear(ACTIVATIONS[activation](gate) * product, layer.down)
