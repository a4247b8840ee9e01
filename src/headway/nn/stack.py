"""The Transformer's body: N blocks and a final norm. Encoder, decoder and vision differ only in mask and front end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.config import Alibi, ModelConfig, Relative
from headway.config import Rope as RopeConfig
from headway.nn.block import Block, Surroundings
from headway.nn.cache import Cache
from headway.nn.fused import Encoded, pass_through
from headway.nn.masks import Mask, Sight, build_mask
from headway.nn.norms import make_norm
from headway.nn.positions import Rope, ScoreBias


class Stack(nn.Module):
    """Blocks over one sequence.

    With `recompute` a block keeps only its input for the backward pass and runs again in it (arXiv:1604.06174): one
    more forward pass for memory of one block instead of all. The random state is put back, so dropout is the same.

    Args:
        config: the model. is_decoder: the causal stack, with cross-attention in an encoder-decoder.
    """

    recompute = False

    def __init__(self, config: ModelConfig, *, is_decoder: bool) -> None:
        super().__init__()
        every = config.attention.cross_every if is_decoder else 0
        directions = config.masks(decoder=is_decoder)
        self.blocks = nn.ModuleList(
            Block(
                config,
                layer,
                (mask == "causal", config.window(layer)),
                cross=every > 0 and layer % every == 0,
            )
            for layer, mask in enumerate(directions)
        )
        self.norm = make_norm(config.d_model, config.norm) if config.placement != "post" else nn.Identity()
        positions = config.positions
        self.rope: Rope | None
        self.window_rope: Rope | None
        self.rope, self.window_rope = _ropes(config, self.windows)
        turned = positions.layers if isinstance(positions, RopeConfig) else (False,)
        self.turned = [turned[layer % len(turned)] for layer in range(len(self.blocks))]
        self.bias = (
            ScoreBias(positions, config.n_heads, bidirectional=not is_decoder and config.kind != "decoder")
            if isinstance(positions, Alibi | Relative)
            else None
        )

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None where it sees everything."""
        return [block.mask[1] for block in self.blocks if isinstance(block, Block)]

    def forward(
        self,
        x_BTD: Tensor,
        sight: Sight,
        cache: Cache | None = None,
        encoder_BSD: Tensor | None = None,
        encoder_real: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), normalised; (B, 1, D) for a cache with `last_only` where no token is padding.

        Args:
            sight: where the tokens stand, which are real, which document they are of.
            cache: remembers keys and values; `sight` then describes the new tokens only.
            encoder_BSD, encoder_real: what cross-attention reads, and which of it is not padding.
        """
        angles = self._angles(sight, x_BTD, cache)
        sights = _sights(sight, cache, self.windows)
        encoded = None if encoder_BSD is None else Encoded(encoder_BSD, encoder_real)
        fused = pass_through(self, x_BTD, sight, cache, encoded, angles)
        if fused is not None:
            return fused
        masks: dict[tuple[bool, int | None], Mask] = {}
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if block.mask not in masks:
                is_causal, window = block.mask
                masks[block.mask] = build_mask(sights[layer], is_causal=is_causal, window=window)
        cross = Mask()
        if encoder_real is not None:
            cross = Mask(dense=encoder_real[:, None, None, :], sighted=cache is not None and cache.sees_encoder)
        biases = self._biases(sights, x_BTD)
        for layer, block in enumerate(self.blocks):
            turn = angles[self.windows[layer] is not None] if self.turned[layer] else None
            around = Surroundings(masks, turn, biases.get(id(sights[layer])), cache, encoder_BSD, cross)
            if self.recompute and self.training and cache is None and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, around, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, around)
        asks_last = cache is not None and cache.asks_last(sight.k_real)
        out: Tensor = self.norm(x_BTD[:, -1:] if asks_last else x_BTD)
        return out

    def _angles(self, sight: Sight, like: Tensor, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """RoPE's angles for layers that see everything, and for sliding ones."""
        if self.rope is None or self.window_rope is None:
            return None, None
        length = sight.document_lengths() if cache is None else cache.declared[:, None]
        angles = self.rope.angles(sight.q_positions, like, length if self.rope.by_length else None)
        if self.window_rope is self.rope:
            return angles, angles
        return angles, self.window_rope.angles(sight.q_positions, like)

    def _biases(self, sights: list[Sight], like: Tensor) -> dict[int, Tensor]:
        """One score bias per distinct set of keys (a rolling cache holds other keys than a contiguous one)."""
        if self.bias is None:
            return {}
        distinct = {id(sight): sight for sight in sights}
        return {key: self.bias(s.q_positions, s.k_positions, like.dtype) for key, s in distinct.items()}


def _ropes(config: ModelConfig, windows: list[int | None]) -> tuple[Rope, Rope] | tuple[None, None]:
    """The rotary tables of the full and of the sliding layers: the same one, unless these have a theta of their own."""
    positions = config.positions
    if not isinstance(positions, RopeConfig):
        return None, None
    rope = Rope(positions, config.d_head, config.max_len)
    if positions.window_theta is None or not any(windows):
        return rope, rope
    local = RopeConfig(theta=positions.window_theta, fraction=positions.fraction, layout=positions.layout)
    return rope, Rope(local, config.d_head, config.max_len)


def _sights(sight: Sight, cache: Cache | None, windows: list[int | None]) -> list[Sight]:
    """What each layer sees: the sequence itself, or the cache's columns with the new tokens in them."""
    if cache is None:
        return [sight] * len(windows)
    plain = cache.length == 0 and sight.k_real is None
    uniform = cache.length is not None and cache.shown is None and sight.k_real is None
    seen = cache.begin(sight.q_positions, sight.k_real)
    views: dict[int | None, Sight] = {}
    for window, k_positions in seen.items():
        everything = uniform and k_positions.shape[1] == cache.length
        views[window] = Sight(
            sight.q_positions,
            k_positions,
            k_real=None if everything else k_positions >= 0,
            plain=plain and everything,
            latest=True,
            sighted=sight.k_real is None,
        )
    return [views[window] for window, _ in cache.layers]
