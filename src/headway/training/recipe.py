"""The recipe: from one dial, the data and a time budget to every number of a run.

What a user leaves open is chosen here, once, before the run, and written into its config; nothing is adapted later,
so a run can be repeated and resumed exactly. The rows that justify each choice are in docs/recipe.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.config import DEFAULT_HEAD, ModelConfig, as_tagged
from headway.families._preset import check_preset, preset_family, preset_fields
from headway.machine import Probe, choose
from headway.nn import Transformer
from headway.run_config import RunConfig, Train, flatten
from headway.training.evaluate import precision
from headway.training.loop import configure
from headway.training.optimizers import make_optimizer
from headway.training.teaching import Teacher

# The shape of every model that the recipe builds; a user's fields are laid over it.
ARCHITECTURE: Mapping[str, Any] = {
    "kind": "decoder",
    "norm": {"type": "rmsnorm"},  # arXiv:1910.07467
    "positions": {"type": "rope", "layout": "interleaved"},  # arXiv:2104.09864; this layout is one complex product
    "attention": {"qk_norm": "rmsnorm"},  # arXiv:2302.05442: bounded scores allow high rates
    "feed_forward": {"activation": "relu2"},  # arXiv:2109.08668: as good as SwiGLU here, and cheaper
    "init": {"std": None, "residual": "zero"},  # every block begins as the identity
}
# Of models in a published family's form: a table that is also the output wants small numbers.
PRESET_INIT: Mapping[str, Any] = {"std": 0.02, "residual": "scaled"}
# What a published model is tuned with (arXiv:1810.04805, appendix A.3; the rate's middle value).
TUNING: Mapping[str, Any] = {"optimizer": "adamw", "lr": 5e-5, "weight_decay": 0.01, "beta2": 0.999}
TUNING_EPOCHS, TUNING_ROWS, TUNING_WARMUP = 3.0, 32, 0.1
WIDTH_PER_LAYER = 64  # d_model = 64 depth, heads of 64: 6 layers of 384, 12 of 768
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
# Rates at d_model 128. Tables (embedding, head) see sparse gradients, so their rate falls with the square root of the
# width; Muon's update has a fixed length per direction, so its rate does not depend on the width.
TABLE_RATE, ADAMW_RATE, MUON_RATE = 0.04, 0.004, 0.03
# Of presets whose norms stand behind the residual (BERT) or whose scores have a scale of their own (T5): measured, see
# docs/recipe.md, as the rates above are those of the recipe's own form.
POST_TABLE_RATE, GENTLE_MUON_RATE = 0.001, 0.01
LION_SHARE, LION_BETA2 = 0.2, 0.99  # of AdamW's rate: 3 to 10 times lower (arXiv:2302.06675, section 5)
# Of adapters, whatever their rank about ten times that of fine-tuning all weights; of what is smaller still, more
# (LoRA arXiv:2106.09685, table 11; (IA)^3 arXiv:2205.05638, section 3.4; prompts arXiv:2104.08691, section 3).
METHOD_RATES: Mapping[str, float] = {
    "lora": 5e-4,
    "bottleneck": 5e-4,
    "ia3": 3e-3,
    "prefix": 1e-2,
    "prompt": 1e-2,
    "partial": 2e-4,
}
DEFAULT_BUDGET = "3m"
SHARE_FOR_STEPS = 0.9  # of the budget; the rest is for evaluation, samples and checkpoints
EVALUATIONS = 10
LAYER_CALL = 0.0015  # seconds for one token through one layer, batch 1: measured 1.1 ms on two CPU cores
PASSES = 8  # over the data, after which more of them teach a small model little
ROW_PASSES = 30  # over labelled examples, pairs and images, of which there are few
TRIAL_STEPS = 4
MOST_CONTEXT = 256
# Measured, not taken from the scaling laws of long runs: with Muon and minutes of training the optimum lies at fewer
# tokens per parameter than Chinchilla's 20 (arXiv:2203.15556). See docs/recipe.md.
TOKENS_PER_PARAMETER = 2.0

Clock = Callable[[ModelConfig, Train, int], float]
Trial = Callable[[ModelConfig, int, int], Mapping[str, Tensor]]
Maker = Callable[[ModelConfig], Transformer]


@dataclass(frozen=True)
class Facts:
    """What the recipe asks of the data.

    Attributes:
        tokens: positions that one pass over the training side puts through the model.
        fields: what the data decides about the model: vocabulary, kind, head, special tokens, patches.
        rows: examples of the training side, None where the text is cut into windows.
        context: positions of the longest example, None for windows.
        base: the config of the published model that is trained further, if one is.
        longest: positions that a teacher can read, None without one.
        batches: of one pass, by a budget of padded tokens; None where all examples have one length.
    """

    tokens: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    context: int | None = None
    base: ModelConfig | None = None
    longest: int | None = None
    batches: Callable[[int], int] | None = None

    def rows_of_batch(self, train: Train) -> float:
        """Rows of an update, of batches that a budget of tokens makes their mean."""
        if train.batch_tokens is None or self.batches is None:
            return train.batch_size or 1
        return (self.rows or 1) / self.batches(train.batch_tokens)


def random_windows(config: ModelConfig, rows: int, context: int, *, isolate: bool = True) -> dict[str, Tensor]:
    """Packed windows of random tokens; with `isolate` every row holds two documents, as packed rows do."""
    ids = torch.randint(config.vocab_size, (rows, context))
    inputs = {"input_ids": ids, "labels": ids}
    # Their mask takes another path through attention.
    return {**inputs, "documents": (torch.arange(context) >= context // 2).long().expand_as(ids)} if isolate else inputs


def time_step(
    config: ModelConfig,
    train: Train,
    context: int,
    device: str = "cpu",
    *,
    trial: Trial = random_windows,
    teacher: Teacher | None = None,
    make: Maker = Transformer,
) -> float:
    """Seconds per update of the model that `make` gives on a batch of `trial`'s: the median of a few steps, after one
    to warm up. A `teacher` on the device reads each batch too.

    The generator's state is put back, so the run that follows is the one its seed names.
    """
    place = torch.device(device)
    finish = torch.cuda.synchronize if place.type == "cuda" else bool
    with torch.random.fork_rng([] if place.type == "cpu" else [place]):
        model = make(config).to(place)
        configure(model, train, teacher)
        optimizer = make_optimizer(model, config, train)
        inputs = trial(config, (train.batch_size or 1) // train.accumulation, context)
        inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
        seconds = []
        for _ in range(TRIAL_STEPS):
            begin = time.perf_counter()
            for _ in range(train.accumulation):
                with precision(train.dtype, place):
                    loss = model.loss(**inputs)
                torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(0.0)
            optimizer.zero_grad()
            finish()
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]


def resolve(
    run: RunConfig, facts: Facts, probe: Probe | None, clock: Clock = time_step
) -> tuple[ModelConfig, RunConfig]:
    """Fill in every open number of a run.

    Args:
        run: what the user said. facts: what the data says.
        probe: the machine's measured limits (headway.machine), None to judge from trial steps alone.
        clock: seconds per training step of a model; the default runs a few real steps.

    Returns:
        The model, and the run with nothing open among dtype, steps, batch size, rates, warmup and intervals.
    """
    run = _tuned(run) if facts.base is not None else run
    if run.train.steps is None and run.train.epochs is None and run.budget is None:
        said = {"budget": DEFAULT_BUDGET} if facts.base is None else {}
        epochs = TUNING_EPOCHS if facts.base is not None else None
        run = run.model_copy(update={**said, "train": run.train.model_copy(update={"epochs": epochs})})
    budget = run.budget_seconds
    context = run.data.context or facts.context or min(_context(facts.tokens), facts.longest or MOST_CONTEXT)
    model = facts.base or _model(run, facts, context, budget, _rate(probe))
    length = context if facts.rows is None else max(facts.tokens // facts.rows, 1)
    batch = _rows(run, facts, lambda: _batch_size(_expected_tokens(run, model, facts, length, budget, probe), length))
    batch = -(-batch // run.train.accumulation) * run.train.accumulation
    train = _rates(run.train.model_copy(update={"batch_size": batch}), model, run.preset is not None)
    train, seconds = _fastest(train, model, context, probe, clock)
    evaluations = EVALUATIONS
    budgeted = run.train.batch_tokens is not None and facts.rows is not None
    # Steps of one pass over the data.
    passes = (facts.rows or 1) / facts.rows_of_batch(run.train) if budgeted else facts.tokens / (batch * length)
    if train.steps is None and train.epochs is not None:
        train = train.model_copy(update={"steps": max(math.ceil(train.epochs * passes), 1)})
    elif train.steps is None:
        assert budget is not None
        seconds = seconds or clock(model, train, context)
        affordable = int(budget * SHARE_FOR_STEPS / seconds)
        evaluations = _evaluations(train, model, seconds, budget * (1 - SHARE_FOR_STEPS))
        useful = math.ceil((PASSES if facts.rows is None else ROW_PASSES) * passes)
        train = train.model_copy(update={"steps": max(min(affordable, useful), 1)})
    train = _intervals(train, evaluations, TUNING_WARMUP if facts.base is not None else 0.02)
    if budgeted:  # the rows of a batch were needed to time a step; a config says one of the two
        train = train.model_copy(update={"batch_size": None})
    data = run.data.model_copy(update={"context": context})
    fields = model.model_dump(mode="json")
    return model, run.model_copy(update={"model": fields, "train": train, "data": data})


def _rows(run: RunConfig, facts: Facts, chosen: Callable[[], int]) -> int:
    """Rows of an update: what the user says, what a budget of tokens comes to, or what is `chosen` for a new model."""
    if run.train.batch_tokens is not None:
        return max(round(facts.rows_of_batch(run.train)), 1)
    return run.train.batch_size or (chosen() if facts.base is None else TUNING_ROWS)


def _tuned(run: RunConfig) -> RunConfig:
    """The numbers of fine-tuning, where the user has not said others."""
    lr = METHOD_RATES.get(run.tuning.type, TUNING["lr"]) if run.tuning is not None else TUNING["lr"]
    lion = {"lr": LION_SHARE * lr, "beta2": LION_BETA2} if run.train.optimizer == "lion" else {}
    fields = {**TUNING, "lr": lr, **lion}
    open_fields = {key: value for key, value in fields.items() if key not in run.train.model_fields_set}
    return run.model_copy(update={"train": run.train.model_copy(update=open_fields)})


def _fastest(
    train: Train, model: ModelConfig, context: int, probe: Probe | None, clock: Clock
) -> tuple[Train, float | None]:
    """The dtype that whole steps are fastest in, and their seconds where they were timed.

    The rate of a product decides only whether a lower precision is worth a trial: casts, and kernels that exist in
    float32 alone, can cost more than the product gains.
    """
    if train.dtype != "auto":
        return train, None
    candidates = ["float32"]
    if probe is not None and choose(probe).dtype != "float32":
        candidates.append(choose(probe).dtype)
    trials = [train.model_copy(update={"dtype": dtype}) for dtype in candidates]
    if len(trials) == 1:
        return trials[0], None
    seconds = [clock(model, trial, context) for trial in trials]
    best = min(seconds)
    return trials[seconds.index(best)], best


def _context(train_tokens: int) -> int:
    """A power of two up to MOST_CONTEXT of which the data has at least 64."""
    return max(8, min(MOST_CONTEXT, 1 << int(math.log2(max(train_tokens // 64, 8)))))


def _rate(probe: Probe | None) -> float:
    """Multiply-add rate in FLOP/s that training can expect: 60 % of the measured GEMM peak."""
    return 0.6 * probe.peak() if probe is not None else 5e10


def _model(run: RunConfig, facts: Facts, context: int, budget: float | None, rate: float) -> ModelConfig:
    """The model of these sizes: the recipe's own, or that of a published family."""
    given = dict(run.model)
    depth = given.pop("depth", None)
    if "d_model" not in given and "n_layers" not in given and depth is None:
        depth = 4 if budget is None else _depth(facts, budget * rate)
    sizes: dict[str, Any] = {}
    if depth is not None:
        sizes = {"d_model": WIDTH_PER_LAYER * depth, "n_layers": depth, "n_heads": max(depth, 1)}
    elif "d_model" in given:
        sizes = {"n_layers": max(1, round(given["d_model"] / WIDTH_PER_LAYER)), "n_heads": _heads(given["d_model"])}
    else:
        width = WIDTH_PER_LAYER * given["n_layers"]
        sizes = {"d_model": width, "n_heads": _heads(width)}
    sizes = {**sizes, "max_len": context}
    if run.preset is not None:
        return _published(run.preset, sizes, facts, given)
    return ModelConfig(**_over(_over(ARCHITECTURE, {**sizes, **facts.fields}), given))


def _published(name: str, sizes: Mapping[str, Any], facts: Facts, given: Mapping[str, Any]) -> ModelConfig:
    """A model of a family's form. Raises ConfigError where data or user ask for what the family does not have."""
    family, data = preset_family(name), facts.fields
    head = _over({"head": {"type": DEFAULT_HEAD[str(family.fixed["kind"])]}}, data)["head"]
    head = _over({"head": head}, {"head": as_tagged(given.get("head", {}))})["head"]
    known = flatten(_over(_over(sizes, data), given))
    below = preset_fields(family, head["type"], {key: value for key, value in known.items() if value is not None})
    said = {key: head[key] for key in ("labels", "problem") if key in head}
    # A mask's id stands in the tokenizer alone: no config.json says it.
    tokens = {key: value for key, value in data.get("tokens", {}).items() if key != "mask"}
    above = {"vocab_size": data.get("vocab_size", 0), "tokens": tokens, "head": said, "init": PRESET_INIT}
    model = ModelConfig(**_over(_over(below, above), given))
    check_preset(name, model)
    return model


def _heads(width: int) -> int:
    """Heads of 64, or the largest power of two below that divides the width."""
    size = 64
    while size > 1 and width % size:
        size //= 2
    return max(width // size, 1)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The user's fields over the recipe's; a different `type`, or a plain name, replaces the whole choice."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        same = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        )
        out[key] = {**old, **value} if same and isinstance(old, Mapping) else value
    return out


def _depth(facts: Facts, flops: float) -> int:
    """The deepest model that still sees TOKENS_PER_PARAMETER tokens per parameter in the budget."""
    best = DEPTHS[0]
    for depth in DEPTHS:
        width = WIDTH_PER_LAYER * depth
        matrices = 12 * depth * width**2 + facts.fields.get("vocab_size", 0) * width
        tokens = min(flops / (6 * matrices), PASSES * facts.tokens)
        if tokens >= TOKENS_PER_PARAMETER * matrices:
            best = depth
    return best


def _expected_tokens(
    run: RunConfig, model: ModelConfig, facts: Facts, length: int, budget: float | None, probe: Probe | None
) -> float:
    """Tokens that the run will see, before its speed is measured."""
    if run.train.steps is not None or budget is None:
        steps = run.train.steps or 1
        return float(steps * 16 * length) if run.train.epochs is None else run.train.epochs * facts.tokens
    matrices = model.n_layers * (2 * model.d_model * (model.n_heads + model.n_kv_heads) * model.d_head)
    matrices += model.n_layers * 2 * model.d_model * model.d_ff + model.d_model * model.vocab_size
    return min(budget * _rate(probe) / (6 * matrices), PASSES * facts.tokens)


def _batch_size(tokens: float, context: int) -> int:
    """Sequences per update: about 2 sqrt(D) tokens for a run of D, the growth of the critical batch
    (arXiv:1812.06162, arXiv:2410.21676), as a power of two."""
    return max(4, 1 << round(math.log2(max(2 * math.sqrt(tokens) / context, 1))))


def _rates(train: Train, model: ModelConfig, preset: bool) -> Train:
    is_post = preset and model.placement == "post"
    is_gentle = is_post or (preset and model.attention.scale is not None)
    table, muon = POST_TABLE_RATE if is_post else TABLE_RATE, GENTLE_MUON_RATE if is_gentle else MUON_RATE
    base = {"muon": table, "lion": LION_SHARE * ADAMW_RATE}.get(train.optimizer, ADAMW_RATE)
    lr = train.lr or base * math.sqrt(128 / model.d_model)
    beta2 = LION_BETA2 if train.optimizer == "lion" and "beta2" not in train.model_fields_set else train.beta2
    return train.model_copy(update={"lr": lr, "muon_lr": train.muon_lr or muon, "beta2": beta2})


def _evaluations(train: Train, model: ModelConfig, seconds: float, budget: float) -> int:
    """How many evaluations, each with its sample of text, fit into `budget` seconds: one to ten.

    A forward pass is a third of a step's work; a sampled token costs what a layer's operations cost to start.
    """
    passes = train.eval_windows / (train.batch_size or 1) * seconds / 3
    return min(max(int(budget / (passes + train.sample_tokens * model.n_layers * LAYER_CALL)), 1), EVALUATIONS)


def _intervals(train: Train, evaluations: int, warmup_share: float) -> Train:
    """Warmup of a share of the steps (at least 10 steps, at most a quarter), the evaluations, four checkpoints."""
    steps = train.steps or 1
    warmup = train.warmup if train.warmup is not None else min(max(10, round(steps * warmup_share)), steps // 4)
    return train.model_copy(
        update={
            "warmup": warmup,
            "eval_every": train.eval_every or -(-steps // evaluations),
            "checkpoint_every": train.checkpoint_every or max(1, steps // 4),
        }
    )
