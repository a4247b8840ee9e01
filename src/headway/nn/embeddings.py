"""The front ends: ids or image patches become vectors, with the additive position schemes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.config import Audio, Learned, ModelConfig, Patch, Sinusoidal
from headway.nn.norms import make_norm
from headway.nn.positions import sinusoidal


class Embeddings(nn.Module):
    """token + position + token type, scaled, normalised, dropped: (B, T) -> (B, T, D).

    Args:
        config: the model. tokens: the other side's table, for the decoder of an encoder-decoder.
    """

    def __init__(self, config: ModelConfig, *, is_decoder: bool = False, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        shape = config.embeddings
        width = shape.width or config.d_model
        self.positions, self.width, self.scale = config.positions, width, shape.scale
        hides = config.head.type == "masked-patches"
        self.patches = Patches(config.d_model, shape.patch, hides=hides) if shape.patch else None
        self.audio = Sound(config.d_model, shape.audio) if shape.audio and not is_decoder else None
        self.tokens = tokens
        if tokens is None and self.audio is None and config.vocab_size:
            self.tokens = nn.Embedding(config.vocab_size, width)
        self.types = nn.Embedding(shape.token_types, width) if shape.token_types else None
        length = shape.audio.count if shape.audio and not is_decoder else config.max_len
        rows = length + config.positions.offset if isinstance(config.positions, Learned) else 0
        self.learned = nn.Embedding(rows, width) if rows else None
        self.norm = make_norm(width, config.norm) if shape.norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.project = nn.Linear(width, config.d_model) if shape.width else nn.Identity()

    def forward(
        self, positions: Tensor, inputs: Tensor, token_types: Tensor | None = None, hidden_BP: Tensor | None = None
    ) -> Tensor:
        """Embed `inputs` standing at `positions` (B|1, T).

        `inputs`: ids (B, T), pixels (B, C, height, width) or a spectrogram (B, bins, frames). `hidden_BP`: the patches
        that are not to be seen.
        """
        front = {2: self.tokens, 3: self.audio, 4: self.patches}[inputs.ndim]
        assert front is not None
        x_BTD: Tensor = front(inputs) if hidden_BP is None else front(inputs, hidden_BP)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if isinstance(self.positions, Sinusoidal):
            x_BTD = x_BTD + sinusoidal(positions, self.width, self.positions).to(x_BTD.dtype)
        elif isinstance(self.positions, Learned) and self.learned is not None:
            x_BTD = x_BTD + self.learned(positions + self.positions.offset)
        if self.types is not None:
            x_BTD = x_BTD + self.types(torch.zeros_like(inputs) if token_types is None else token_types)
        out: Tensor = self.project(self.dropout(self.norm(x_BTD)))
        return out


def cut(pixels_BCYX: Tensor, size: int) -> Tensor:
    """An image as its size x size patches in reading order. (B, C, height, width) -> (B, patches, C size^2)."""
    return F.unfold(pixels_BCYX, size, stride=size).transpose(1, 2)


class Patches(nn.Module):
    """An image as a sequence: each size x size patch is one linear projection (arXiv:2010.11929, equation 1).

    With `hides` a learned vector can stand for a patch (arXiv:2111.09886, section 3.2).
    """

    def __init__(self, d_model: int, config: Patch, *, hides: bool = False) -> None:
        super().__init__()
        self.size = config.size
        self.project = nn.Linear(config.pixels, d_model, bias=config.bias)
        self.mask = nn.Parameter(torch.zeros(d_model)) if hides else None
        self.first = nn.Parameter(torch.zeros(d_model)) if config.first_token else None
        self.registers = nn.Parameter(torch.zeros(config.registers, d_model)) if config.registers else None

    def forward(self, pixels_BCYX: Tensor, hidden_BP: Tensor | None = None) -> Tensor:
        """(B, C, image, image) -> (B, extra + patches, D): the learned vectors, then the patches in reading order."""
        x_BTD: Tensor = self.project(cut(pixels_BCYX, self.size))
        if hidden_BP is not None and self.mask is not None:
            x_BTD = torch.where(hidden_BP[..., None], self.mask.to(x_BTD.dtype), x_BTD)
        learned = [part for part in (self.first, self.registers) if part is not None]
        if learned:
            front = torch.cat([part.view(-1, part.shape[-1]) for part in learned])
            x_BTD = torch.cat((front.expand(len(x_BTD), -1, -1), x_BTD), 1)
        return x_BTD


class Sound(nn.Module):
    """A spectrogram as a sequence, half as long as its frames (Whisper, arXiv:2212.04356, section 2.2)."""

    def __init__(self, d_model: int, config: Audio) -> None:
        super().__init__()
        self.first = nn.Conv1d(config.bins, d_model, 3, padding=1)
        self.second = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)

    def forward(self, frames_BMT: Tensor) -> Tensor:
        """(B, bins, frames) -> (B, frames / 2, D)."""
        return F.gelu(self.second(F.gelu(self.first(frames_BMT)))).transpose(1, 2)
