"""A model that talks to order: what it says follows from the byte before, as a table says. And its ChatML tokenizer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from headway.checkpoints.hub_folder import folder_files, write_folder
from headway.config import ModelConfig
from headway.families import families
from headway.nn import Transformer
from headway.text import Tokenizer, train_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 258  # <|im_end|>; what the model's config calls its end is <|endoftext|>, 256

Table = Mapping[int, Iterable[int]]


@functools.cache
def chat_tokenizer() -> Tokenizer:
    """256 bytes and the control tokens."""
    return train_tokenizer(["any text"], "byte", 256 + len(CONTROL), special_tokens=CONTROL)


def saying(*answers: str, ends: bool = True) -> dict[int, set[int]]:
    """A table that says one of the answers after the line break that ends a header; no byte may stand in two places.

    Without `ends` the last byte of each is followed by its first.
    """
    table: dict[int, set[int]] = {10: set()}
    for answer in answers:
        data = answer.encode()
        table[10].add(data[0])
        for one, other in itertools.pairwise((*data, END if ends else data[0])):
            table.setdefault(one, set()).add(other)
    return table


def table_model(table: Table, max_len: int = 256) -> Transformer:
    """Embeddings are unit vectors, the blocks add nothing, and the head's columns are the table."""
    config = ModelConfig(
        d_model=288,
        n_layers=1,
        n_heads=1,
        d_head=8,
        d_ff=32,
        vocab_size=259,
        max_len=max_len,
        norm={"type": "rmsnorm"},
        feed_forward={"activation": "silu", "gated": True},
        positions="rope",
        embeddings={"tied": False},
        tokens={"eos": 256},
    )
    model = Transformer(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.zero_()
    model.embeddings.tokens.weight.copy_(torch.eye(259, 288))
    for one, others in table.items():
        for other in others:
            model.head.output.weight[other, one] = 2.0  # after the norm: a logit of 32 against zeros
    return model


def chat_folder(target: Path, table: Table, max_len: int = 256, template: str | None = CHATML) -> Path:
    """A Hugging Face folder with such a model."""
    model = table_model(table, max_len)
    family = families()["llama"]
    write_folder(target, folder_files(model.config, model.state_dict(), family=family, architecture="LlamaForCausalLM"))
    chat_tokenizer().save(target)
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    return target
