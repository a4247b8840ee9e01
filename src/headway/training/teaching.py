"""Distillation (arXiv:1503.02531): a teacher, and whether it can teach a model.

The teacher reads each pass of a batch as the student does, frozen and in evaluation mode, and its answers stand beside
the labels in the student's loss (nn/heads.py). It is no part of what is trained or saved: a run knows its weights by
their hash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from headway.config import ModelConfig
from headway.errors import ConfigError
from headway.nn import Transformer
from headway.nn.model import Teaching
from headway.run_config import Distill
from headway.text import Tokenizer

_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Teacher:
    """A model that teaches.

    Attributes:
        how: its name, its share of the loss, the temperature. model: frozen, in evaluation mode.
        tokenizer: None for images. classes: their names in the order of its logits, () where it knows none.
        hash: of its weights.
    """

    how: Distill
    model: Transformer
    tokenizer: Tokenizer | None
    classes: tuple[str, ...]
    hash: str

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that have names of their own: LABEL_0 is none."""
        return () if all(map(_UNNAMED.fullmatch, self.classes)) else self.classes

    @property
    def teaching(self) -> Teaching:
        """What the student's loss asks for."""
        return Teaching(self.model, self.how.weight, self.how.temperature)

    @property
    def line(self) -> str:
        """What a plan says of it."""
        count = sum(p.numel() for p in self.model.parameters())
        weight, temperature = self.how.weight, self.how.temperature
        return f"teacher: {self.how.teacher}, {count:,} parameters, weight {weight:g}, temperature {temperature:g}"

    def on(self, device: torch.device) -> Teacher:
        """The same teacher on a device."""
        return replace(self, model=self.model.to(device))

    def check_words(self, tokenizer: Tokenizer, name: str) -> None:
        """Raises ConfigError unless `tokenizer`, called `name`, is the teacher's own."""
        own = "none" if self.tokenizer is None else self.tokenizer.hash
        if own != tokenizer.hash:
            fix = "leave out tokenizer and base: a new model takes its teacher's"
            found = f"{self.how.teacher} with tokenizer {own} and {name} with tokenizer {tokenizer.hash}"
            raise ConfigError("distill.teacher and tokenizer", found, "one tokenizer", fix)

    def check_classes(self, names: tuple[str, ...]) -> None:
        """Raises ConfigError for other classes than the teacher's, or another order of them."""
        if self.names and self.names != names:
            found = f"{self.how.teacher} with classes {', '.join(self.names)[:200]}, data with {', '.join(names)[:200]}"
            raise ConfigError("distill.teacher and data.labels", found, "the same classes in the same order")

    def check_length(self, context: int | None, key: str) -> None:
        """Raises ConfigError for sequences longer than the teacher reads."""
        longest = self.model.config.max_len
        if context is not None and context > longest:
            found = f"{context} tokens for {self.how.teacher}, which reads {longest}"
            raise ConfigError(f"{key} and distill.teacher", found, "sequences that both can read", f"{key}={longest}")


def check_teaching(teacher: ModelConfig, student: ModelConfig) -> None:
    """Whether the two score the same things. Raises ConfigError naming both."""
    head = student.head
    gives = {"pooled-embedding": "vectors", "masked-patches": "pixels"}.get(head.type)
    what = "a number" if getattr(head, "problem", "single") == "regression" else gives
    if what is not None:
        raise ConfigError("distill", f"a student that gives {what}", "a head over a vocabulary, classes or places")
    ours, theirs = _scores(student), _scores(teacher)
    different = [f"{name} {theirs[name]} and {ours[name]}" for name in ours if ours[name] != theirs.get(name)]
    if different:
        found = f"teacher and student differ in {', '.join(different)}"
        raise ConfigError(
            "distill.teacher and model", found, "a teacher whose answers mean the same", "another teacher"
        )


def _scores(config: ModelConfig) -> dict[str, object]:
    """What inputs and answers must have in common."""
    head, patch = config.head, config.embeddings.patch
    is_language = head.type in ("causal-lm", "masked-lm")
    out: dict[str, object] = {"head": head.type}
    # Classes can be told by either; the tokens of a text are foretold each in its own way.
    out["kind"] = config.kind if is_language or config.kind not in ("encoder", "decoder") else "encoder or decoder"
    out["vocabulary"] = config.vocab_size if is_language else None
    out["labels"], out["problem"] = getattr(head, "labels", None), getattr(head, "problem", None)
    out["image"] = None if patch is None else f"{patch.channels} x {patch.image} x {patch.image}"
    return out
