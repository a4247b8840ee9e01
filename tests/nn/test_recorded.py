"""A recorded step replayed is the model's own next token: what a CUDA graph does, done by a trace of the operations.

A trace, like a CUDA graph, holds every number that Python had when it was made; while it is made nobody may look at a
tensor's numbers. So what is right here for many tokens behind one recording is right when a GPU replays it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fused import FORMS, SIZES, WHOLE, gap, in_codes
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from headway.config import ModelConfig
from headway.kernels.native import twins_only
from headway.nn import Transformer, recorded
from headway.nn.cache import Cache
from headway.nn.recorded import Outputs, Recorded, Step

LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "item"}


class Blindfold(TorchDispatchMode):
    """Refuses every operation by which the host learns a number of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in LOOKS or has_mask:
            raise AssertionError(f"{name} looks at the data")
        return func(*args, **(kwargs or {}))


def refused(*_: Any) -> None:
    """In the place of methods that no dispatch sees."""
    raise AssertionError("a step looks at the data")


def trace(step: Step) -> Step:
    """Record as a CUDA graph does: what the step changes while it is recorded is put back."""
    cache: Cache = step.__self__._cache  # type: ignore[attr-defined]
    before = [tensor.clone() for tensor in cache.tensors]
    with Blindfold(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cpu", False)  # what is done on a CPU alone
        for name in ("tolist", "numpy", "item"):
            patch.setattr(Tensor, name, refused)
        graph = make_fx(lambda: step(), tracing_mode="real")()
    for tensor, old in zip(cache.tensors, before, strict=True):
        tensor.copy_(old)
    recordings.append(graph)
    replay: Callable[[], Outputs] = graph
    return replay


recordings: list[Any] = []


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record on the CPU too, in traces; those made so far."""
    monkeypatch.setitem(recorded.RECORDERS, "cpu", trace)
    monkeypatch.setattr(recorded, "SHOWN", 16)
    recordings.clear()
    return recordings


def written(model: Transformer, ids: Tensor, first: int, **more: Any) -> tuple[Tensor, Cache]:
    """Logits behind a prompt, then of one token at a time."""
    cache = model.new_cache(len(ids), 40, dtype=more.pop("dtype", None))
    out = [model(ids[:, :first], cache=cache, **more).logits[:, -1:]]
    out += [model(ids[:, t : t + 1], cache=cache).logits for t in range(first, ids.shape[1])]
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("form", [form for form in FORMS if form != "by length"])
@torch.no_grad()
def test_a_replayed_step_is_the_models_own(form: str, traces: list[Any]) -> None:
    """Over two recordings (16 and 32 columns shown), with windows that roll."""
    model, ids = in_codes(ModelConfig(**{**SIZES, **FORMS[form]})), torch.randint(50, (2, 28))
    with twins_only():
        found, cache = written(model, ids, 6)
        assert [type(program) for program in cache.programs.values()] == [Recorded]
        assert len(traces) == (1 if form == "mistral" else 2)  # whose window of 6 is all there is
        recorded.RECORDERS.pop("cpu")
        known, plain = written(model, ids, 6)
    assert not plain.programs and torch.equal(cache.lengths, plain.lengths) and cache.length == plain.length == 28
    # Attention over columns that are masked adds in another order.
    assert gap(found, known) < 1e-5
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 50
    with twins_only():
        assert gap(written(model, changed, 6)[0][:, -1], known[:, -1]) > 10 * gap(found, known)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@torch.no_grad()
def test_keys_in_fewer_bits(dtype: torch.dtype, traces: list[Any]) -> None:
    model, ids = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]})), torch.randint(50, (2, 20))
    with twins_only():
        found, _ = written(model, ids, 6, dtype=dtype)
        recorded.RECORDERS.pop("cpu")
        known, _ = written(model, ids, 6, dtype=dtype)
    assert len(traces) == 2 and gap(found, known) < 1e-5


@torch.no_grad()
def test_rows_of_unequal_length_that_move_and_shrink(traces: list[Any]) -> None:
    """Padding in the prompt; rows are dropped and tokens forgotten: what was recorded before is not used then."""
    model, ids = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]})), torch.randint(50, (3, 20))
    real = torch.ones(3, 6)
    real[0, 2:] = 0
    rows = torch.tensor([2, 0])

    def run() -> Tensor:
        cache = model.new_cache(3, 40)
        model(ids[:, :6], attention_mask=real, cache=cache)
        for t in range(6, 12):
            model(ids[:, t : t + 1], cache=cache)
        cache.reorder(rows)
        out = [model(ids[rows, t : t + 1], cache=cache).logits for t in range(12, 16)]
        return torch.cat(out, 1)

    def cut() -> Tensor:
        cache = model.new_cache(1, 40)
        model(ids[:1, :8], cache=cache)
        for t in range(8, 12):
            model(ids[:1, t : t + 1], cache=cache)
        cache.crop(9)
        model(ids[1:2, 9:12], cache=cache)  # several at once are not recorded
        return torch.cat([model(ids[1:2, t : t + 1], cache=cache).logits for t in range(12, 15)], 1)

    with twins_only():
        found = run(), cut()
        count = len(traces)
        recorded.RECORDERS.pop("cpu")
        known = run(), cut()
    # One for each set of rows; after a crop the tensors are where they were, and so is the recording.
    assert count == len(traces) == 3
    assert gap(found[0], known[0]) < 1e-5 and gap(found[1], known[1]) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_an_encoder_decoder(padded: bool, traces: list[Any]) -> None:
    model = in_codes(ModelConfig(**{**SIZES, **WHOLE["t5"]}))
    ids, targets = torch.randint(50, (3, 9)), torch.randint(50, (3, 12))
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 4:] = not padded

    def run() -> Tensor:
        cache, out = model.new_cache(3, 12), []
        for t in range(12):
            more = {"input_ids": ids, "attention_mask": real} if t == 0 else {}
            out.append(model(**more, decoder_input_ids=targets[:, t : t + 1], cache=cache).logits)
        return torch.cat(out, 1)

    with twins_only():
        found = run()
        recorded.RECORDERS.pop("cpu")
        known = run()
    assert len(traces) == 1 and gap(found, known) < 1e-5


@pytest.mark.parametrize("form", ["by length", "experts"])
@torch.no_grad()
def test_what_has_to_look_is_not_recorded(form: str, traces: list[Any]) -> None:
    experts = {"feed_forward": {"activation": "silu", "gated": True, "experts": {"experts": 2, "top_k": 1}}}
    model = Transformer(ModelConfig(**{**SIZES, **(experts if form == "experts" else FORMS[form])})).eval()
    _, cache = written(model, torch.randint(50, (1, 12)), 6)
    assert not traces and not any(isinstance(program, Recorded) for program in cache.programs.values())


@torch.no_grad()
def test_a_device_that_refuses_to_record_is_told_of_and_lived_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, ids = in_codes(ModelConfig(**{**SIZES, **FORMS["llama"]})), torch.randint(50, (2, 14))
    with twins_only():
        known, _ = written(model, ids, 6)
        monkeypatch.setitem(recorded.RECORDERS, "cpu", refuse)
        with pytest.warns(RuntimeWarning, match="cannot be recorded: operation not permitted") as said:
            found, _ = written(model, ids, 6)
    assert len(said) == 1 and gap(found, known) < 1e-5


def test_the_blindfold_sees_a_look() -> None:
    """The control of the tests above."""
    with Blindfold(), pytest.raises(AssertionError, match="looks at the data"):
        torch.ones(3).sum().item()
    with Blindfold(), pytest.raises(AssertionError, match="looks at the data"):
        torch.ones(3)[torch.tensor([True, False, True])]
