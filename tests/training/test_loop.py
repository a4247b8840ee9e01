"""What an update is: accumulation to the last bit of float64, clipping, evaluation, early stop, equal seeds."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Run, T, checkpoint_bytes, model_config, source, train_config, valid, weights
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from headway.config import ModelConfig
from headway.errors import BugError, ConfigError
from headway.nn import Transformer, heads, stack
from headway.nn.block import Block
from headway.training.evaluate import evaluate
from headway.training.events import CheckpointEvent, EvalEvent, StepEvent
from headway.training.loop import Hooks, Trainer, configure
from headway.training.objectives import IGNORED, ShuffledExamples, TrainingBatch
from headway.training.parallel import Parallel
from headway.training.schedules import scale


def uneven_batch(rows: int) -> TrainingBatch:
    """Rows with very different numbers of supervised tokens, one with none."""
    ids = torch.randint(0, 257, (rows, T))
    labels = torch.randint(0, 257, (rows, T))
    for row in range(rows):
        labels[row, : row * T // rows] = IGNORED
    labels[0] = IGNORED
    return TrainingBatch({"input_ids": ids, "labels": labels}, list(range(rows)))


class Fixed:
    """The same batch for ever."""

    identity: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, batch: TrainingBatch) -> None:
        self.value = batch

    def batch(self, cursor: int) -> TrainingBatch:
        return self.value


def one_pass_gradient(model: Transformer, batch: TrainingBatch) -> tuple[float, list[Tensor]]:
    """The oracle: sum of token losses over the number of supervised tokens, in one pass, without our loss code."""
    logits = model(batch.inputs["input_ids"]).logits
    labels = batch.inputs["labels"]
    chosen = labels != IGNORED
    picked = torch.log_softmax(logits, -1)[chosen].gather(1, labels[chosen][:, None])
    loss = -picked.sum() / chosen.sum()
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("passes", [1, 2, 3, 4, 7, 20])
def test_accumulation_is_token_exact(tmp_path: Path, passes: int) -> None:
    torch.manual_seed(1)
    model = Transformer(model_config(dropout=0.0)).double()
    batch = uneven_batch(7)
    loss, expected = one_pass_gradient(model, batch)
    trainer = Trainer(model, Fixed(batch), train_config(batch_size=20, accumulation=passes), tmp_path)
    tokens, mean, norm = trainer._gradients(batch)
    assert tokens == batch.tokens and mean == pytest.approx(loss, abs=1e-12)
    assert norm == pytest.approx(math.sqrt(sum(float((g * g).sum()) for g in expected)), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < 1e-12


def test_control_the_mean_of_pass_means_is_not_the_gradient(tmp_path: Path) -> None:
    model = Transformer(model_config(dropout=0.0)).double()
    batch = uneven_batch(7)
    _, expected = one_pass_gradient(model, batch)
    parts = batch.split(3)
    for inputs in parts:
        (model(**inputs).loss / len(parts)).backward()
    worst = max(float((p.grad - g).abs().max()) for p, g in zip(model.parameters(), expected, strict=True))  # type: ignore[operator]
    assert worst > 1e-4


def test_clipping_scales_to_the_norm(tmp_path: Path) -> None:
    class Spy:
        def __init__(self, model: Transformer) -> None:
            self.model, self.norms = model, list[float]()

        def step(self, scale: float) -> None:
            squares = [float((p.grad.double() ** 2).sum()) for p in self.model.parameters() if p.grad is not None]
            self.norms.append(math.sqrt(sum(squares)))
            with torch.no_grad():
                for p in self.model.parameters():
                    p -= 0.01 * p.grad if p.grad is not None else 0

        def zero_grad(self) -> None:
            self.model.zero_grad()

        def state(self) -> dict[str, object]:
            return {}

        def load_state(self, state: dict[str, object]) -> None:
            pass

    for clip in (0.05, 1e6, 0.0):
        model = Transformer(model_config())
        spy = Spy(model)
        run = Trainer(model, source(), train_config(clip=clip, steps=3), tmp_path / str(clip), optimizer=spy)
        seen: list[StepEvent] = []
        run.hooks = Hooks()
        run._listener = lambda event: seen.append(event) if isinstance(event, StepEvent) else None  # noqa: B023
        run.fit()
        for used, event in zip(spy.norms, seen, strict=True):
            assert event.grad_norm is not None and event.grad_norm > 0.05
            assert used == pytest.approx(min(event.grad_norm, clip) if clip else event.grad_norm, rel=1e-5)


def test_the_rate_follows_the_schedule_and_events_count(tmp_path: Path) -> None:
    run = Run(tmp_path, train_config(steps=5, warmup=2, schedule="cosine"), model_config(dropout=0.0))
    result = run.fit()
    steps: list[StepEvent] = run.said(StepEvent)
    assert [event.step for event in steps] == [1, 2, 3, 4, 5]
    assert [event.lr for event in steps] == pytest.approx([0.01 * scale(s, run.train) for s in range(5)])
    assert result.tokens == sum(event.tokens for event in steps) and result.step == 5 and result.stopped == "done"
    assert all(event.tokens_per_second > 0 and event.memory > 1 << 20 and event.eta >= 0 for event in steps)
    assert steps[-1].eta == 0 and all(event.share_of_peak is None for event in steps)


def test_share_of_peak_is_flops_per_token_over_the_measured_peak(tmp_path: Path) -> None:
    seen: list[StepEvent] = []
    hooks = Hooks(lambda e: seen.append(e) if isinstance(e, StepEvent) else None, None, 2e6, 5e10)
    Trainer(Transformer(model_config()), source(), train_config(), tmp_path, hooks=hooks).fit()
    for event in seen:
        assert event.share_of_peak == pytest.approx(event.tokens_per_second * 2e6 / 5e10)


def test_evaluation_is_the_mean_over_tokens_and_bits_over_bytes(tmp_path: Path) -> None:
    model = Transformer(model_config()).double()
    nats = tokens = size = 0.0
    model.eval()
    for batch in valid():
        labels = batch.inputs["labels"]
        logp = torch.log_softmax(model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits, -1)
        chosen = labels != IGNORED
        nats -= float(logp[chosen].gather(1, labels[chosen][:, None]).sum())
        tokens += int(chosen.sum())
        size += int((labels[chosen] != 256).sum())
    model.train()
    state = torch.get_rng_state()
    from contextlib import nullcontext

    found = evaluate(Parallel(model), valid(), torch.device("cpu"), nullcontext)
    assert found is not None and found.tokens == tokens
    assert found.loss == pytest.approx(nats / tokens, abs=1e-12)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, abs=1e-12)
    assert model.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.fault("R18")
@pytest.mark.parametrize("labels", ["none", "ignored"])
def test_an_evaluation_without_labels_is_not_a_number_but_nothing(tmp_path: Path, labels: str) -> None:
    def empty() -> Iterable[TrainingBatch]:
        if labels == "none":
            return []
        ids = torch.zeros(2, T, dtype=torch.int64)
        return [TrainingBatch({"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}, [0, 1], 0)]

    run = Run(tmp_path, train_config(eval_every=2), valid=empty)
    result = run.fit()
    assert [(e.loss, e.bits_per_byte, e.tokens, e.best) for e in run.said(EvalEvent)] == [(None, None, 0, False)] * 3
    assert result.evaluation is not None and result.evaluation.loss is None and result.best_step is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.fault("R18")
def test_training_batches_without_labels_are_skipped_and_counted(tmp_path: Path) -> None:
    ids = torch.zeros(4, T, dtype=torch.int64)
    batch = TrainingBatch({"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}, [0, 1, 2, 3])
    run = Run(tmp_path, data=Fixed(batch), valid=None)
    trainer = run.trainer()
    before = weights(trainer.model)
    result = trainer.fit()
    assert result.skipped == 6 and all(e.loss is None and not e.applied for e in run.said(StepEvent))
    assert all(torch.equal(before[name], now) for name, now in trainer.model.state_dict().items())


def test_early_stop_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.1, 2.2, 1.0])

    def scripted() -> Iterable[TrainingBatch]:
        return valid()

    run = Run(tmp_path, train_config(steps=40, eval_every=2, early_stop=3, checkpoint_every=1), valid=scripted)
    trainer = run.trainer()
    import headway.training.loop as loop
    from headway.training.evaluate import Evaluation

    original = loop.evaluate
    loop.evaluate = lambda *args: Evaluation(next(losses), None, 1)  # type: ignore[assignment]
    try:
        result = trainer.fit()
    finally:
        loop.evaluate = original
    assert (result.stopped, result.step, result.best_step) == ("early", 10, 4)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"step-00000004", "step-00000010"} <= kept and "step-00000006" not in kept
    again = Run(tmp_path, run.train, valid=scripted).fit("must")
    assert (again.stopped, again.step, again.best_step) == ("early", 10, 4)


def test_a_sample_is_taken_at_evaluations_without_touching_the_run(tmp_path: Path) -> None:
    def sample() -> str:
        return f"drew {torch.rand(3).sum() > 0}"

    with_sample = Run(tmp_path / "a", train_config(eval_every=2), sample=sample)
    with_sample.fit()
    assert [event.sample for event in with_sample.said(EvalEvent)] == ["drew True"] * 3
    without = Run(tmp_path / "b", train_config(eval_every=2), valid=valid)
    without.fit()
    one, two = (run.said(CheckpointEvent)[-1].path for run in (with_sample, without))
    assert checkpoint_bytes(one) == checkpoint_bytes(two)


@pytest.mark.fault("R14")
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    finals = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = Run(tmp_path / name, train_config(seed=seed, eval_every=3)).fit()
        finals.append(checkpoint_bytes(result.checkpoint))
    assert finals[0] == finals[1]
    assert all(finals[0][name] != finals[2][name] for name in finals[0])


def test_a_run_folder_holds_what_it_should(tmp_path: Path) -> None:
    run = Run(tmp_path, train_config(steps=6, checkpoint_every=2, eval_every=3))
    result = run.fit()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl", "loss.svg", "loss.png"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000006",
    ]
    assert sorted(path.name for path in result.checkpoint.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert [event.step for event in run.said(CheckpointEvent)] == [2, 4, 6]


class BlockCalls:
    """How often the blocks of a model run."""

    def __init__(self, model: Transformer) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(self.add)  # the second run ends early

    def add(self, *given: object) -> None:
        self.count += 1


def gradients(model: Transformer, inputs: dict[str, Tensor], recompute: bool) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and runs of a block per block, from one seed."""
    configure(model, train_config(checkpoint_activations=recompute))
    calls = BlockCalls(model)
    torch.manual_seed(5)
    loss = model.loss(**inputs)
    found = list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    return loss.detach(), [g for g in found if g is not None], calls.count


RECOMPUTED: dict[str, dict[str, object]] = {
    "decoder": {"attention": {"dropout": 0.2}},
    "relative": {"positions": "relative"},
    "experts": {"feed_forward": {"activation": "gelu", "experts": {"experts": 4, "top_k": 2}}},
    "encoder-decoder": {"kind": "encoder-decoder", "tokens": {"decoder_start": 0}},
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_activations_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Transformer(model_config(n_layers=3, dropout=0.3, **RECOMPUTED[name])).train()
    blocks = sum(isinstance(module, Block) for module in model.modules())
    inputs = {"input_ids": torch.randint(257, (4, T)), "labels": torch.randint(257, (4, T))}
    loss, expected, once = gradients(copy.deepcopy(model), inputs, False)
    again, found, twice = gradients(copy.deepcopy(model), inputs, True)
    assert (once, twice) == (blocks, 2 * blocks)
    assert torch.equal(loss, again) and len(found) == len(expected) > 8
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Negative control: without the random state put back, a block's second run drops other numbers.
    monkeypatch.setattr(stack, "checkpoint", partial(stack.checkpoint, preserve_rng_state=False))
    if name == "experts":  # other tokens then go to other experts, and torch notices
        with pytest.raises(CheckpointError):
            gradients(copy.deepcopy(model), inputs, True)
        return
    _, other, _ = gradients(copy.deepcopy(model), inputs, True)
    assert not all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_nothing_is_recomputed_in_evaluation() -> None:
    model = Transformer(model_config(n_layers=3))
    configure(model, train_config(checkpoint_activations=True))
    calls = BlockCalls(model)
    ids = torch.randint(257, (2, T))
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            model.loss(ids, input_ids=ids)
    model.loss(ids, input_ids=ids).backward()  # in evaluation mode, with gradients
    assert calls.count == 3 * 3


def test_training_and_evaluation_never_hold_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = heads._loss_and_slope

    def spy(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(logits.numel() * logits.element_size())
        return original(logits, *rest)

    monkeypatch.setattr(heads, "_loss_and_slope", spy)
    monkeypatch.setattr(heads, "LOGIT_BYTES", 10 * 257 * 4)
    monkeypatch.setattr(heads.LanguageModelHead, "forward", lambda *given: pytest.fail("all logits were made"))
    Run(tmp_path, train_config(eval_every=3)).fit()
    assert max(seen) == 10 * 257 * 4 and len(seen) > 6 * 2 * 3


def test_a_z_loss_raises_the_loss_and_needs_a_vocabulary(tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 0.1):
        run = Run(tmp_path / str(weight), train_config(steps=2, z_loss=weight))
        run.fit()
        losses.append((run.said(StepEvent)[0].loss, run.said(EvalEvent)[-1].loss))
    (plain, _), (raised, _) = losses
    # At the start logits are nearly equal, so that Z is about V times the mean of their exponentials.
    assert raised - plain == pytest.approx(0.1 * math.log(257) ** 2, rel=0.3)
    classes = model_config(kind="encoder", head={"type": "sequence-classification", "labels": 3})
    with pytest.raises(ConfigError, match=r"train\.z_loss"):
        Trainer(Transformer(classes), source(), train_config(z_loss=0.1), tmp_path)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        Trainer(Transformer(model_config()), source(), train_config(steps=None, warmup=None), tmp_path)
    ragged = TrainingBatch({"input_ids": torch.zeros(3, T), "labels": torch.zeros(2, T)}, [0])
    with pytest.raises(BugError, match="rows"):
        ragged.split(1)


def test_shuffled_examples_show_each_once_per_epoch_and_are_addressed_by_number() -> None:
    def collate(examples: list[int], rng: object) -> dict[str, Tensor]:
        return {"labels": torch.tensor(examples)}

    def make(seed: int) -> ShuffledExamples[int]:
        return ShuffledExamples(range(10), collate, 4, seed, {"data": "ten"})

    one, two = make(0), make(0)
    seen = [int(x) for cursor in range(5) for x in one.batch(cursor).inputs["labels"]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert torch.equal(two.batch(3).inputs["labels"], one.batch(3).inputs["labels"])
    other = [int(x) for cursor in range(5) for x in make(1).batch(cursor).inputs["labels"]]
    assert other != seen


def test_experts_train_too_and_the_balance_loss_counts(tmp_path: Path) -> None:
    config: ModelConfig = model_config(feed_forward={"activation": "gelu", "experts": {"experts": 4, "top_k": 2}})
    run = Run(tmp_path, train_config(steps=12), config)
    run.fit()
    losses = [event.loss for event in run.said(StepEvent)]
    assert losses[-1] < losses[0]
