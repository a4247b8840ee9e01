"""Training runs of a fraction of a second, for the tests of the loop and of the kill campaign."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.config import ModelConfig
from headway.data.batches import PackedBatches
from headway.data.store import TokenStore
from headway.nn import Transformer
from headway.run_config import Train
from headway.training.events import Event
from headway.training.loop import Hooks, Result, Resume, Trainer
from headway.training.objectives import BatchSource, CausalLM, TrainingBatch, causal_evaluation

TEXT = (
    "The try statement specifies exception handlers and/or cleanup code for a group of statements. "
    "A finally clause is always executed before leaving the try statement, whether an exception has occurred or not. "
) * 8
T = 16


def store(text: str = TEXT, size: int = 90) -> TokenStore:
    """Bytes of a text as tokens, cut into documents of `size`, each closed by id 256."""
    data = text.encode()
    documents = [[*data[i : i + size], 256] for i in range(0, len(data), size)]
    return TokenStore.of(documents, [len(document) - 1 for document in documents])


def model_config(**fields: Any) -> ModelConfig:
    small: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 257, "max_len": T}
    return ModelConfig(**{**small, "dropout": 0.1, **fields})


def train_config(**fields: Any) -> Train:
    some: dict[str, Any] = {"steps": 6, "batch_size": 4, "accumulation": 2, "lr": 0.01, "muon_lr": 0.02, "warmup": 2}
    return Train(**{**some, **fields})


def source(seed: int = 0, batch_size: int = 4, text: str = TEXT, tokenizer: str = "bytes") -> CausalLM:
    return CausalLM(PackedBatches(store(text), T, batch_size, seed), tokenizer)


def valid() -> Iterable[TrainingBatch]:
    sizes = torch.ones(257, dtype=torch.int64)
    sizes[256] = 0
    return causal_evaluation(store(TEXT[:400]), T, 8, 12, token_bytes=sizes)


@dataclass
class Run:
    """A trainer that keeps what it said."""

    folder: Path
    train: Train = field(default_factory=train_config)
    model: ModelConfig = field(default_factory=model_config)
    data: BatchSource | None = None
    valid: Callable[[], Iterable[TrainingBatch]] | None = valid
    config: Mapping[str, object] | None = None
    events: list[Event] = field(default_factory=list)
    on_event: Callable[[Event], None] = lambda event: None
    sample: Callable[[], str] | None = None

    def trainer(self) -> Trainer:
        torch.manual_seed(self.train.seed)
        model = Transformer(self.model)
        data = self.data or source(self.train.seed, self.train.batch_size or 4)
        hooks = Hooks(listener=self._listen, sample=self.sample)
        return Trainer(model, data, self.train, self.folder, self.valid, self.config, hooks)

    def fit(self, resume: Resume = "never", override: bool = False) -> Result:
        return self.trainer().fit(resume, override)

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    def said(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def checkpoint_bytes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint: weights, optimizer, random state, cursor, manifest."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
