"""What moves the weights: Muon for matrices beside AdamW for the rest, or AdamW, Lion or Adafactor for all.

    kept per weight     adamw 2     muon 1     lion 1     adafactor: one row and one column of a matrix

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the nearest
orthogonal matrix, so that every direction of the update has the same length. Embeddings, heads, norms and biases are
not linear maps between hidden states and stay with AdamW (arXiv:1711.05101). Weight decay is decoupled and never
touches norms and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from headway.config import ModelConfig
from headway.run_config import Train
from headway.training.parts import exported, fused_rows, is_shared_out, local, part, whole

State = Sequence[Mapping[str, Tensor]]
"""For each parameter in its order the tensors that are kept of it, by name."""

# Odd polynomials a x + b x^3 + c x^5 that in turn drive singular values between 5e-3 and 1 to between 0.88 and 1.09
# (Polar Express, arXiv:2505.16932, algorithm 1 with its cushion; all but the last scaled for a safety factor of 1.02).
POLAR_EXPRESS = (
    (7.992286996003102, -21.872634449083794, 15.414201669740786),
    (3.8327867204433548, -2.7325518263923074, 0.5016630104170504),
    (3.1272683771407035, -2.253983723864315, 0.4520747264596417),
    (2.2000249627933774, -1.577056645069942, 0.4089370629967801),
)


def inverse_root(gram: Tensor) -> Tensor:
    """About S^(-1/2) of symmetric matrices S = X X^T, so that its product with X is X's orthogonal factor.

    (n, d, d). The polynomials are evaluated on S alone, which is smaller than a wide X; as they commute, their product
    is collected beside it. What bounds the largest singular value is the eighth root of trace(S^4), of which S^2 is
    needed anyway: for 128 equal ones it is 1.8 times too large, the norm of X 11 times, which is a polynomial's worth.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 1e-14  # no direction is made of next to nothing
    A = gram / trace
    square = A @ A
    top = square.norm(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-6)
    A, square = A / top, square / top**2
    root: Tensor | None = None
    for step, (a, b, c) in enumerate(POLAR_EXPRESS):
        P = torch.baddbmm(A, A, A, beta=b, alpha=c) if step else b * A + c * square
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        root = P if root is None else P @ root
        if step + 1 < len(POLAR_EXPRESS):
            A = P @ (P @ A)
    assert root is not None
    root /= (trace * top).sqrt()
    return root


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal factor U V^T of each matrix U S V^T, to within about 0.1 per singular value.

    (n, rows, cols); singular values below 5e-3 of the largest stay smaller.
    """
    X, is_tall = matrices, matrices.shape[-2] > matrices.shape[-1]
    root = inverse_root(_gram(X))
    return X @ root if is_tall else root @ X


def _gram(X: Tensor) -> Tensor:
    """The smaller of X X^T and X^T X."""
    return X.mT @ X if X.shape[-2] > X.shape[-1] else X @ X.mT


class Maps(NamedTuple):
    """Maps of one shape that stand one below the other in a matrix: its momentum, and where the update is added."""

    move: Tensor
    target: Tensor


class Muon:
    """Orthogonalised momentum for the matrices of a stack.

    Each head's query, key and value is a map of its own, and so are gate and product where they share a matrix.

    Args:
        pieces: (parameter, rows of each part) in a fixed order. lr: peak rate, the RMS change of an update before the
            sqrt(max(1, rows / cols)) of its shape. momentum: of the Nesterov average. weight_decay: decoupled.
    """

    name = "muon"

    def __init__(
        self,
        pieces: Sequence[tuple[nn.Parameter, tuple[int, ...]]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.beta, self.weight_decay = lr, momentum, weight_decay
        self.parameters = [parameter for parameter, _ in pieces]
        self._runs = [[(size, len([*same])) for size, same in groupby(rows)] for _, rows in pieces]
        self._momenta = [_zeros(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rate."""
        gradients = [_gradient(p) for p in self.parameters]
        torch._foreach_lerp_(self._momenta, gradients, 1 - self.beta)
        ahead = torch._foreach_lerp(gradients, self._momenta, self.beta)
        _decay(self.parameters, self.lr * scale * self.weight_decay)
        targets = []
        by_size: dict[int, list[Maps]] = {}  # the roots of Gram matrices of one size are taken together
        for shard, parameter, runs in zip(ahead, self.parameters, self._runs, strict=True):
            move = whole(shard, parameter)
            targets.append(torch.zeros_like(move) if is_shared_out(parameter) else parameter)
            start = 0
            for size, count in runs:
                cut = slice(start, start := start + size * count)
                maps = Maps(*(t[cut].view(count, size, -1) for t in (move, targets[-1])))
                by_size.setdefault(min(maps.move.shape[1:]), []).append(maps)
        for some in by_size.values():
            roots = inverse_root(torch.cat([_gram(maps.move) for maps in some]))
            for (move, target), root in zip(some, torch.split(roots, [len(maps.move) for maps in some]), strict=True):
                rows, columns = move.shape[1:]
                factors = (move, root) if rows > columns else (root, move)
                target.baddbmm_(*factors, alpha=-self.lr * scale * max(1.0, rows / columns) ** 0.5)
        for parameter, target in zip(self.parameters, targets, strict=True):
            if target is not parameter:
                local(parameter).add_(part(target, parameter))

    def state(self) -> State:
        """The momentum of each matrix."""
        return [{"momentum": exported(m, p)} for m, p in zip(self._momenta, self.parameters, strict=True)]

    def load_state(self, state: State) -> None:
        """Restore what `state` returned, bit for bit."""
        for momentum, saved, parameter in zip(self._momenta, state, self.parameters, strict=True):
            momentum.copy_(part(saved["momentum"], parameter))


class Method(Protocol):
    """One way of moving parameters; it owns those it is given and no others."""

    name: str
    parameters: list[nn.Parameter]

    def step(self, scale: float) -> None:
        """Update its parameters at `scale` times the peak rate."""

    def state(self) -> State:
        """Everything that the next step depends on, for each parameter by name."""

    def load_state(self, state: State) -> None:
        """Restore what `state` returned, bit for bit; each tensor is whole, of which this process takes its part."""


class AdamW:
    """Moments of the gradient and of its square, weight decay decoupled (arXiv:1711.05101), fused by torch.

    Args:
        parameters: what it moves. lr: peak rate. betas: of the two moments. eps: added to the root of the second.
        weight_decay: of the parameters with two dimensions or more.
    """

    name = "adamw"

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.lr, self.parameters = lr, list(parameters)
        self._held = {p: local(p) for p in self.parameters}
        self._apart = [
            (p, held) for p, held in self._held.items() if held is not p
        ]  # shares, with gradients to hand on
        decayed, kept = _decayed(parameters), [p for p in parameters if p.ndim < 2]
        groups = [(decayed, weight_decay), (kept, 0.0)]
        used = [{"params": [self._held[p] for p in some], "weight_decay": share} for some, share in groups if some]
        self.inner = torch.optim.AdamW(used, lr=lr, betas=betas, eps=eps, fused=True)

    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rate; a parameter without a gradient stays."""
        for group in self.inner.param_groups:
            group["lr"] = self.lr * scale
        for parameter, held in self._apart:
            held.grad = None if parameter.grad is None else local(parameter.grad)
        self.inner.step()

    def state(self) -> State:
        """The moments and the number of updates of each parameter; empty before its first."""
        return [
            {name: value if name == "step" else exported(value, p) for name, value in sorted(moments.items())}
            for p in self.parameters
            for moments in (self.inner.state.get(self._held[p], {}),)
        ]

    def load_state(self, state: State) -> None:
        """Restore what `state` returned, bit for bit."""
        for parameter, moments in zip(self.parameters, state, strict=True):
            self.inner.state[self._held[parameter]] = {
                name: (value if name == "step" else part(value, parameter)).clone() for name, value in moments.items()
            }


class Lion:
    """The sign of an interpolated momentum (arXiv:2302.06675, algorithm 2): every weight moves by the rate.

        u = sign(b1 m + (1 - b1) g);   w -= rate (u + decay w);   m = b2 m + (1 - b2) g

    One number per weight is kept, AdamW keeps two. The paper's rates are 3 to 10 times lower than AdamW's, its decay
    higher by as much.

    Args:
        parameters: what it moves. lr: peak rate. betas: of the move and of the momentum, 0.9 and 0.99 in the paper.
        weight_decay: of the parameters with two dimensions or more.
    """

    name = "lion"

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        self.parameters, self.lr, self.betas, self.weight_decay = list(parameters), lr, betas, weight_decay
        self._momenta = [_zeros(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rate; a missing gradient counts as zero."""
        rate, (fast, slow) = self.lr * scale, self.betas
        gradients = [_gradient(p) for p in self.parameters]
        moves = torch._foreach_lerp(self._momenta, gradients, 1 - fast)
        torch._foreach_sign_(moves)
        _decay(self.parameters, rate * self.weight_decay)
        torch._foreach_add_([local(p) for p in self.parameters], moves, alpha=-rate)
        torch._foreach_lerp_(self._momenta, gradients, 1 - slow)

    def state(self) -> State:
        """The momentum of each parameter."""
        return [{"momentum": exported(m, p)} for m, p in zip(self._momenta, self.parameters, strict=True)]

    def load_state(self, state: State) -> None:
        """Restore what `state` returned, bit for bit."""
        for momentum, saved, parameter in zip(self._momenta, state, self.parameters, strict=True):
            momentum.copy_(part(saved["momentum"], parameter))


class Adafactor:
    """The second moment of a matrix from its row and column means alone (arXiv:1804.04235, algorithm 4).

        b = 1 - t^-0.8;   R, C = the means of b-averaged g^2 + 1e-30 over columns, over rows;   V = R C / mean(R)
        u = g / sqrt(V);   u /= max(1, rms(u));   w -= rate (u + decay w)

    R + C numbers are kept for a matrix of R x C. The rate is the schedule's: neither relative to the step nor to the
    weights' size, and there is no momentum (section 9's other options are left out). Convolutions count as the
    matrix of their output channels; vectors keep their whole second moment.

    Args:
        parameters: what it moves. lr: peak rate. weight_decay: of the parameters with two dimensions or more.
    """

    name = "adafactor"

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        self.parameters, self.lr, self.weight_decay, self.updates = list(parameters), lr, weight_decay, 0
        self._moments: list[list[Tensor]] = []
        for p in self.parameters:
            shape = (p.shape[0], p.shape[1:].numel()) if p.ndim >= 2 else (p.numel(),)
            self._moments.append([local(p).new_zeros(size, requires_grad=False) for size in shape])

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update at `scale` times the peak rate; a missing gradient counts as zero."""
        self.updates += 1
        share, rate = self.updates**-0.8, self.lr * scale
        _decay(self.parameters, rate * self.weight_decay)
        for parameter, moments in zip(self.parameters, self._moments, strict=True):
            g = whole(_gradient(parameter), parameter)
            g = g.flatten(1) if g.ndim >= 2 else g.flatten()
            square = g * g + 1e-30
            if len(moments) == 2:
                rows, columns = moments
                rows.lerp_(square.mean(1), share)
                columns.lerp_(square.mean(0), share)
                # Two roots, not the root of a product: tiny gradients would underflow.
                move = g * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()
            else:
                move = g * moments[0].lerp_(square, share).rsqrt()
            move /= (move.norm() / move.numel() ** 0.5).clamp(min=1.0)
            local(parameter).sub_(part(move.view(parameter.shape), parameter), alpha=rate)

    def state(self) -> State:
        """For each parameter the means of its rows and columns, or its second moment, and the number of updates."""
        count = torch.tensor(self.updates)
        names = ("rows", "columns")
        return [{**dict(zip(names, moments, strict=False)), "updates": count} for moments in self._moments]

    def load_state(self, state: State) -> None:
        """Restore what `state` returned, bit for bit."""
        for own, saved in zip(self._moments, state, strict=True):
            self.updates = int(saved["updates"])
            for moment, name in zip(own, ("rows", "columns"), strict=False):
                moment.copy_(saved[name])


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This process's part of the gradient, zeros where there is none."""
    return local(parameter.grad) if parameter.grad is not None else torch.zeros_like(local(parameter))


def _zeros(parameter: nn.Parameter) -> Tensor:
    """As many zeros as this process holds of a parameter."""
    return torch.zeros_like(local(parameter), requires_grad=False)


def _decayed(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """Those that weight decay touches: matrices and tables, neither norms nor biases."""
    return tuple(p for p in parameters if p.ndim >= 2)


def _decay(parameters: Iterable[nn.Parameter], share: float) -> None:
    """Take away a share of the weights, which is what decoupled decay is."""
    decayed = [local(p) for p in _decayed(parameters)]
    if share and decayed:
        torch._foreach_mul_(decayed, 1 - share)


class Optimizer:
    """All parameters of a model, each with the method that suits it; peak rates are fixed, a schedule scales them."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, method by method."""
        return [parameter for method in self.methods for parameter in method.parameters]

    def step(self, scale: float) -> None:
        """Update every parameter at `scale` times its peak rate."""
        for method in self.methods:
            method.step(scale)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, State]:
        """Everything that the next step depends on, by method."""
        return {method.name: method.state() for method in self.methods}

    def load_state(self, state: Mapping[str, State]) -> None:
        """Restore what `state` returned, bit for bit."""
        for method in self.methods:
            method.load_state(state[method.name])


def matrix_parts(model: nn.Module, config: ModelConfig) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """The weight matrices inside the stacks with the rows of their parts, in the order of the module tree.

    Queries, keys and values count head by head: orthogonalised whole, a matrix of them takes three times the
    operations, and the loss falls more slowly (docs/recipe.md).
    """
    fused = fused_rows(config)
    heads = {"qkv": config.n_heads + 2 * config.n_kv_heads, "kv": 2 * config.n_kv_heads, "q": config.n_heads}
    fused |= {name: (config.d_head,) * count for name, count in heads.items()}
    found: list[tuple[nn.Parameter, tuple[int, ...]]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".blocks." in f".{name}" and not name.endswith("router"):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found.append((weight, fused.get(name.rpartition(".")[2], (weight.shape[0],))))
    return found


def make_optimizer(model: nn.Module, config: ModelConfig, train: Train) -> Optimizer:
    """The optimizer that `train` asks for, with every trainable parameter in exactly one method.

    `train.lr` and, with muon, `train.muon_lr` must be set (the recipe does).
    """
    assert train.lr is not None
    rest = [p for p in model.parameters() if p.requires_grad]
    betas, decay = (train.beta1, train.beta2), train.weight_decay
    if train.optimizer == "lion":
        return Optimizer([Lion(rest, train.lr, betas, decay)])
    if train.optimizer == "adafactor":
        return Optimizer([Adafactor(rest, train.lr, decay)])
    methods: list[Method] = []
    if train.optimizer == "muon":
        assert train.muon_lr is not None
        pieces = [(p, rows) for p, rows in matrix_parts(model, config) if p.requires_grad]
        matrices = {id(p) for p, _ in pieces}
        rest = [p for p in rest if id(p) not in matrices]
        methods += [Muon(pieces, train.muon_lr, weight_decay=decay)] if pieces else []
    methods += [AdamW(rest, train.lr, betas, train.eps, decay)] if rest else []
    return Optimizer(methods)
