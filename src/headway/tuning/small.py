"""Small additions: factors (IA)^3, networks behind a part, keys and values before others, vectors before the input.

(IA)^3       y = l * (W x + b)    for keys and values;    y = W (l * x) + b    where hidden units go in
             arXiv:2205.05638, section 3.3; l begins at 1
bottleneck   y + U relu(D y),  y = W x + b               arXiv:1902.00751, figure 2; U begins at zero
prefix       softmax(q [P_k; k]^T) [P_v; v]               arXiv:2101.00190; each layer's own P, learned directly
prompt       [P; x], and what is put out at P is dropped   arXiv:2104.08691
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.nn.masks import Mask
from headway.nn.precision import wide
from headway.tuning.beside import Addition, OnLayer, Rows, Site


class Scaling(OnLayer):
    """Factors of the rows of some parts, or of all columns."""

    merges = True

    def __init__(self, columns: int, rows: int, parts: Mapping[str, Rows], *, of_inputs: bool) -> None:
        super().__init__()
        self.rows, self.parts, self.of_inputs = rows, dict(parts), of_inputs
        sizes = {"inputs": columns} if of_inputs else {name: part.size for name, part in parts.items()}
        self.factors = nn.ParameterDict({name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()})

    @property
    def is_single(self) -> bool:
        """Factors can be weighted and multiplied."""
        return False

    def _vector(self, strength: float, like: Tensor) -> Tensor:
        if self.of_inputs:
            factors: Tensor = 1 + strength * (self.factors["inputs"] - 1)
            return factors.to(like.dtype)
        pieces, at = [], 0
        for name, part in self.parts.items():
            pieces += [like.new_ones(part.start - at), (1 + strength * (self.factors[name] - 1)).to(like.dtype)]
            at = part.start + part.size
        return torch.cat([*pieces, like.new_ones(self.rows - at)])

    def before(self, x: Tensor, strength: float) -> Tensor:
        """l * x where inputs are scaled."""
        return x * self._vector(strength, x) if self.of_inputs else x

    def after(self, out: Tensor, x: Tensor, base: nn.Module, strength: float) -> Tensor:
        """l * y where outputs are."""
        return out if self.of_inputs else out * self._vector(strength, out)

    def merged(self, weight: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """Columns or rows of the weight times l, and the bias with the rows."""
        factors = self._vector(strength, weight)
        if self.of_inputs:
            return weight * factors, bias
        return weight * factors[:, None], None if bias is None else bias * factors


class Bottleneck(OnLayer):
    """A network of a few hidden units behind a layer of R outputs."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(rows, size), nn.Linear(size, rows)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def is_single(self) -> bool:
        """Several add up."""
        return False

    def after(self, out: Tensor, x: Tensor, base: nn.Module, strength: float) -> Tensor:
        """y + U relu(D y)."""
        more: Tensor = self.up(F.relu(self.down(out.to(self.down.weight.dtype)))).to(out.dtype)
        return out + (more if strength == 1.0 else strength * more)


class Prefix(Addition):
    """Keys and values of one layer."""

    def __init__(self, tokens: int, heads: int, size: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(tokens, heads, size) * 0.02) for _ in range(2))


class Prefixes(Site):
    """What stands before the keys and values of one attention."""

    def forward(
        self, k_BSKH: Tensor, v_BSKH: Tensor, mask: Mask, bias: Tensor | None, T: int
    ) -> tuple[Tensor, Tensor, Mask, Tensor | None]:
        """Keys and values with the prefixes, which T queries see whatever else they see, and no score bias moves."""
        B, S = k_BSKH.shape[:2]
        seen = mask.tensor(T, S, k_BSKH.device)
        for one, _ in self.active(Prefix):
            front = len(one.keys)
            k_BSKH, v_BSKH = (
                torch.cat((own.to(rest.dtype).expand(B, -1, -1, -1), rest), 1)
                for own, rest in ((one.keys, k_BSKH), (one.values, v_BSKH))
            )
            seen = None if seen is None else F.pad(seen, (front, 0), value=True)
            bias = None if bias is None else F.pad(bias, (front, 0))
            mask = Mask(dense=seen, sighted=True)
        return k_BSKH, v_BSKH, mask, bias


class Prompt(Addition):
    """Vectors before the input's."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(wide(start).clone())


class Prompts(Site):
    """What stands before the embedded input."""

    @property
    def count(self) -> int:
        """How many vectors are in use."""
        return sum(len(one.vectors) for one, _ in self.active(Prompt))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, count + T, D)."""
        own = [one.vectors.to(x_BTD.dtype).expand(len(x_BTD), -1, -1) for one, _ in self.active(Prompt)]
        return torch.cat((*own, x_BTD), 1)
