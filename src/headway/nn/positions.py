"""Where a token stands: sinusoidal and learned vectors, rotary angles, and biases on the scores.

Additive schemes (sinusoidal, learned) act once, on the embeddings. RoPE turns queries and keys inside every
attention. ALiBi and T5's relative buckets add a bias to the scores. Every scheme takes explicit positions, so padding,
packed documents and a cache need no code of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway import config as cfg


def sinusoidal(positions: Tensor, d_model: int, config: cfg.Sinusoidal) -> Tensor:
    """sin and cos of position / theta^(2i/D) (arXiv:1706.03762, section 3.5). (..., T) -> (..., T, D) float32."""
    exponent = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float64) / d_model
    angles = positions.double()[..., None] * config.theta**-exponent
    parts = (angles.sin(), angles.cos())
    table = torch.stack(parts, -1).flatten(-2) if config.layout == "interleaved" else torch.cat(parts, -1)
    return table.float()


# --- RoPE --------------------------------------------------------------------------------------------------------


def rope_frequencies(config: cfg.Rope, d_head: int, length: int, max_len: int) -> tuple[Tensor, float]:
    """Angles per position of each rotary pair, and the factor on cos and sin, for a sequence of `length` tokens.

    `max_len` is the model's longest sequence, from which longrope's default attention factor follows.

    Returns:
        (R/2,) float64 frequencies in radians per position, R = fraction * d_head, and the attention factor.
    """
    rotary = int(d_head * config.fraction)
    exponent = torch.arange(0, rotary, 2, dtype=torch.float64) / rotary
    inverse = config.theta**-exponent
    scaling = config.scaling
    match scaling:
        case cfg.LinearScaling():
            return inverse / scaling.factor, 1.0
        case cfg.NtkScaling():
            # theta' = theta * factor^(R / (R - 2)): the lowest frequency is divided by exactly `factor`.
            return (config.theta * scaling.factor ** (rotary / (rotary - 2))) ** -exponent, 1.0
        case cfg.DynamicScaling():
            grown = max(length, scaling.original_len) / scaling.original_len
            base = config.theta * (scaling.factor * grown - (scaling.factor - 1)) ** (rotary / (rotary - 2))
            return base**-exponent, 1.0
        case cfg.YarnScaling():
            return _yarn(config, scaling, inverse, rotary)
        case cfg.LongRopeScaling():
            divisors = scaling.long if length > scaling.original_len else scaling.short
            stretch = max(max_len / scaling.original_len, 1.0)
            factor = math.sqrt(1 + math.log(stretch) / math.log(scaling.original_len))
            return inverse / torch.tensor(divisors, dtype=torch.float64), scaling.attention_factor or factor
        case cfg.Llama3Scaling():
            return _llama3(scaling, inverse), 1.0
        case _:
            return inverse, 1.0


def _yarn(config: cfg.Rope, scaling: cfg.YarnScaling, inverse: Tensor, rotary: int) -> tuple[Tensor, float]:
    """NTK by parts (arXiv:2309.00071, section 3.2) with the temperature of section 3.4."""

    def dimension(rotations: float) -> float:
        """The pair that turns `rotations` times over the original length."""
        turns = scaling.original_len / (rotations * 2 * math.pi)
        return rotary * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    ramp = (torch.arange(rotary // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)  # 1 where the frequency is high enough to be left alone

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return inverse / scaling.factor * (1 - kept) + inverse * kept, factor or temperature(1.0)


def _llama3(scaling: cfg.Llama3Scaling, inverse: Tensor) -> Tensor:
    """Keep wavelengths below original / high, divide those above original / low, blend between (Llama 3.1)."""
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_len / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


class Rope(nn.Module):
    """Rotary positions (arXiv:2104.09864): cos and sin tables computed in float64, kept in float32 (or wider).

    Scalings that depend on the length of the sequence (dynamic, longrope) are computed per row from the row's
    declared length: that of the whole sequence in a full forward, that of the cache when decoding. So a cached decode
    equals the full forward of the sequence it was declared for.
    """

    def __init__(self, config: cfg.Rope, d_head: int, max_len: int) -> None:
        super().__init__()
        self.config, self.d_head, self.max_len = config, d_head, max_len
        self.by_length = config.scaling.type in ("dynamic", "longrope")
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def table(self, like: Tensor) -> Tensor:
        """(max_len, R/2) complex cos + i sin in the precision of `like` (at least float32)."""
        key = (_complex(like), like.device)
        if key not in self._tables:
            frequencies, factor = rope_frequencies(self.config, self.d_head, self.max_len, self.max_len)
            positions = torch.arange(self.max_len, dtype=torch.float64)[:, None]
            table = torch.empty(self.max_len, len(frequencies), dtype=key[0])
            # In pieces: in float64 a long context's table takes several times what is kept of it.
            for piece in (slice(start, start + PIECE) for start in range(0, self.max_len, PIECE)):
                table[piece] = _turned(positions[piece] * frequencies, factor, like)
            self._tables[key] = table.to(like.device)
        return self._tables[key]

    def angles(self, positions: Tensor, like: Tensor, length: Tensor | None = None) -> Tensor:
        """cos + i sin (scaled by the attention factor) for `positions` (B|1, T) -> (B|1, T, 1, R/2) complex.

        `length` (B|1, T|1) is the declared length of the sequence each token is in; only scalings `by_length` read it.
        """
        if not self.by_length:
            return self.table(like)[positions][:, :, None]
        length = positions.amax(-1, keepdim=True) + 1 if length is None else length
        distinct, index = torch.unique(length, return_inverse=True)
        rows = [rope_frequencies(self.config, self.d_head, int(n), self.max_len) for n in distinct.tolist()]
        frequencies = torch.stack([row[0] for row in rows]).to(positions.device)[index]
        return _turned(positions.double()[..., None] * frequencies, rows[0][1], like)[:, :, None]


PIECE = 256  # positions of a table computed at once


def _complex(like: Tensor) -> torch.dtype:
    return torch.complex128 if like.dtype == torch.float64 else torch.complex64


def _turned(angles: Tensor, factor: float, like: Tensor) -> Tensor:
    """factor (cos + i sin) of float64 angles, in the precision of `like` (at least float32)."""
    return (torch.polar(torch.ones_like(angles), angles) * factor).to(_complex(like))


# --- biases on the scores ----------------------------------------------------------------------------------------


def alibi_slopes(n_heads: int) -> Tensor:
    """2^(-8/n), 2^(-16/n), ... per head; for other than powers of two, interleaved from the next power
    (arXiv:2108.12409 and its code). (N,) float64."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes, dtype=torch.float64)


def relative_buckets(distance: Tensor, config: cfg.Relative, *, bidirectional: bool) -> Tensor:
    """T5's bucket of key position - query position: exact when near, logarithmic when far (arXiv:1910.10683)."""
    buckets = config.buckets
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(config.max_distance / exact)
    large = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(distance < exact, distance, large)


class ScoreBias(nn.Module):
    """The additive bias of ALiBi or of T5's relative positions, one for all layers of a stack."""

    def __init__(self, config: cfg.Alibi | cfg.Relative, n_heads: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.config, self.n_heads, self.bidirectional = config, n_heads, bidirectional
        if isinstance(config, cfg.Relative):
            self.table = nn.Parameter(torch.zeros(config.buckets, n_heads))

    def forward(self, q_positions: Tensor, k_positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(B|1, T), (B|1, S) -> (B|1, N, T, S)."""
        distance = k_positions[:, None, :] - q_positions[:, :, None]
        if isinstance(self.config, cfg.Relative):
            buckets = relative_buckets(distance, self.config, bidirectional=self.bidirectional)
            return F.embedding(buckets, self.table).permute(0, 3, 1, 2).to(dtype)
        slopes = alibi_slopes(self.n_heads).to(distance.device, dtype)
        return -(distance.abs()[:, None].to(dtype) * slopes[None, :, None, None])

    def by_distance(self, reach: int) -> Tensor:
        """The bias of a key so many positions before or after the query, from -reach to reach, (N, 2 reach + 1)."""
        device = self.table.device if isinstance(self.config, cfg.Relative) else torch.device("cpu")
        distances = torch.arange(-reach, reach + 1, device=device)[None]
        bias = self.forward(torch.zeros_like(distances[:, :1]), distances, torch.float32)
        return bias[0, :, 0].contiguous()
