"""A teacher's share of a loss against its formula in float64, its gradient against differences, and its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from formulas import wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headway import config as cfg
from headway.errors import BugError
from headway.nn import Transformer, heads
from headway.nn.heads import IGNORED
from headway.nn.model import Teaching

B, T, V = 3, 5, 11
W, TEMPERATURE = 0.3, 2.5
EXACT = 1e-12  # float64 sums of at most 165 terms
SIZES: dict[str, Any] = {"n_layers": 1, "n_heads": 2, "vocab_size": V, "max_len": T}
ENCODER: dict[str, Any] = {"kind": "encoder"}
MODELS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "softcap": {"head": {"type": "causal-lm", "softcap": 0.7, "bias": True}},
    "tied": {"embeddings": {"tied": True}},
    "masked-lm": ENCODER,
    "encoder-decoder": {"kind": "encoder-decoder", "tokens": {"decoder_start": 0}},
    "classes": {**ENCODER, "head": {"type": "sequence-classification", "labels": 4}},
    "several": {**ENCODER, "head": {"type": "sequence-classification", "labels": 4, "problem": "multi"}},
    "tags": {**ENCODER, "head": {"type": "token-classification", "labels": 4}},
    "span": {**ENCODER, "head": "span"},
    "vision": {
        "kind": "vision", "vocab_size": 0, "max_len": 5, "embeddings": {"patch": {"size": 4, "image": 8}},
        "head": {"type": "image-classification", "labels": 4},
    },
}  # fmt: skip
LABELS = {"classes": (4, (B,)), "several": (2, (B, 4)), "tags": (4, (B, T)), "span": (3, (B, 2)), "vision": (4, (B,))}


def made(name: str, width: int, seed: int) -> Transformer:
    torch.manual_seed(seed)
    fields = {**SIZES, "d_model": width, "init": {"std": 0.5, "residual": "plain"}, **MODELS[name]}
    return Transformer(cfg.ModelConfig(**fields)).double()


def pair(name: str, weight: float = W) -> tuple[Transformer, Transformer, dict[str, Tensor], Tensor]:
    """A student, its wider teacher, inputs with padding, and labels of which some are ignored."""
    student, teacher = made(name, 8, 1).train(), made(name, 12, 2).eval().requires_grad_(False)
    student.teaching = Teaching(teacher, weight, TEMPERATURE)
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(V, (B, T))}
    inputs["attention_mask"] = torch.arange(T)[None] < torch.tensor([[T], [3], [4]])
    if name == "vision":
        inputs = {"pixel_values": torch.randn(B, 3, 8, 8, dtype=torch.float64)}
    most, shape = LABELS.get(name, (V, (B, T)))
    labels = torch.randint(most, shape)
    labels.view(-1)[1::3] = IGNORED
    return student, teacher, inputs, labels


def logits(name: str, model: Transformer, inputs: dict[str, Tensor], labels: Tensor) -> np.ndarray:
    """(labels, classes) of what is scored, in the order of the labels."""
    more = {}
    if name == "encoder-decoder":
        shifted = torch.cat((torch.zeros(B, 1, dtype=torch.int64), labels[:, :-1]), 1)
        more["decoder_input_ids"] = shifted.where(shifted != IGNORED, 0)
    with torch.no_grad():
        out = wide(model(**inputs, **more).logits)
    if name == "span":
        out = out.swapaxes(1, 2)
    if name == "several":
        out = np.stack((np.zeros_like(out), out), -1)
    return out.reshape(-1, out.shape[-1])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected(name: str, student: Transformer, teacher: Transformer, inputs: dict[str, Tensor], labels: Tensor) -> float:
    """(1 - w) CE + w T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over labels (arXiv:1503.02531)."""
    ours, theirs = (logits(name, model, inputs, labels) for model in (student, teacher))
    total, count = 0.0, 0
    for row, label in enumerate(labels.flatten().tolist()):
        if label == IGNORED:
            continue
        p, q = np.exp(log_softmax(theirs[row] / TEMPERATURE)), np.exp(log_softmax(ours[row] / TEMPERATURE))
        apart = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        total += (1 - W) * -log_softmax(ours[row])[label] + W * TEMPERATURE**2 * apart
        count += 1
    return total / count


@pytest.mark.parametrize("piece", [1, 4 * V * 8, 1 << 25])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_its_formula(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LOGIT_BYTES", piece)
    student, teacher, inputs, labels = pair(name)
    found = student.loss(labels, **inputs).item()
    assert found == pytest.approx(expected(name, student, teacher, inputs, labels), rel=EXACT)
    plain = student.eval().loss(labels, **inputs).item()
    assert plain == pytest.approx(student(**inputs, labels=labels).loss.item(), rel=EXACT)  # evaluation: no teacher
    assert abs(plain - found) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_slope_of_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a random direction; central differences of step 1e-4 err by about 1e-8 of the third derivative."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 4 * V * 8)
    student, _, inputs, labels = pair(name)
    student.head.smoothing, student.head.z_loss = 0.1, 0.2
    parameters = list(student.parameters())
    direction = [torch.randn_like(p) / p.numel() ** 0.5 for p in parameters]
    found = torch.autograd.grad(student.loss(labels, **inputs), parameters, materialize_grads=True)
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=step)
            values.append(student.loss(labels, **inputs).item())
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=step)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-5, abs=1e-7) and abs(slope) > 1e-3


def test_a_student_that_is_its_teacher_has_only_the_labels_left() -> None:
    """KL is zero there, and so is its gradient: what is left is (1 - w) of the labels'."""
    student, _, inputs, labels = pair("decoder")
    student.teaching = None
    plain = student.loss(labels, **inputs)
    slopes = torch.autograd.grad(plain, list(student.parameters()))
    student.teaching = Teaching(student, W, TEMPERATURE)
    found = student.loss(labels, **inputs)
    assert found.item() == pytest.approx((1 - W) * plain.item(), rel=EXACT)
    for one, other in zip(torch.autograd.grad(found, list(student.parameters())), slopes, strict=True):
        assert (one - (1 - W) * other).abs().max() < EXACT


class Largest(TorchDispatchMode):
    """The most numbers of one tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return out


def test_no_logits_of_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the student's nor the teacher's; the control is the model's plain answer."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 8 * 500 * 4)
    sizes = {"n_layers": 1, "n_heads": 2, "vocab_size": 500, "max_len": 64}
    student, teacher = (Transformer(cfg.ModelConfig(d_model=width, **sizes)) for width in (8, 16))
    student.teaching = Teaching(teacher.eval(), W, TEMPERATURE)
    ids = torch.randint(500, (4, 64))
    with Largest() as seen:
        student.train().loss(ids, input_ids=ids).backward()
    assert seen.most < 4 * 64 * 500 / 3  # attention scores are the largest
    with Largest() as seen:
        student(ids)
    assert seen.most >= 4 * 64 * 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_both_sides_are_in_its_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 keeps 8 bits: logits of about 1 err by 4e-3, a loss of about 1 by a few times that."""
    monkeypatch.setattr(heads, "LOGIT_BYTES", 4 * V * 4)
    student, teacher, inputs, labels = pair("masked-lm")
    exact = student.loss(labels, **inputs).item()
    student.float(), teacher.float()
    with torch.autocast("cpu", dtype=dtype):
        loss = student.loss(labels, **inputs)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.05) and loss.dtype == torch.float32


REGRESSION = {"type": "sequence-classification", "labels": 1, "problem": "regression"}


@pytest.mark.parametrize("head", [{"type": "pooled-embedding"}, REGRESSION], ids=["vectors", "a number"])
def test_a_head_without_classes_takes_no_teacher(head: dict[str, Any]) -> None:
    model = Transformer(cfg.ModelConfig(kind="encoder", d_model=8, head=head, **SIZES)).train()
    model.teaching = Teaching(model, W, TEMPERATURE)
    with pytest.raises(BugError, match="teacher"):
        model.loss(torch.zeros(B), input_ids=torch.randint(V, (B, T)))
