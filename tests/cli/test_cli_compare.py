"""`headway tune --compare prompting`: one table on one held-out side; what was done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_loading import published

import headway
from headway.compare import Likeness, Task, likelihoods
from headway.data.forms import Labelled

QUICK = ["train.steps=60", "train.batch_size=8", "train.threads=1", "train.lr=0.01", "--output", "out"]


def rows(count: int) -> str:
    """Classes of equal length: what the small context cuts off tells nothing."""
    return "".join(
        json.dumps({"text": f"{word} thing {number}", "label": word}) + "\n"
        for number in range(count)
        for word in ("x", "q")
    )


def test_it_measures_every_method_once(command, tmp_path: Path) -> None:
    published(tmp_path / "model", "LlamaForCausalLM")
    Path("rows.jsonl").write_text(rows(40))
    words = ["tune", "model", "data.path=rows.jsonl", "--compare", "prompting", "--rows", "12", *QUICK]
    words += ["--methods", "zero-shot,few-shot,lora,full", "data.val_fraction=0.3"]
    said = command(*words, "--json").json
    found = {row["method"]: row for row in said["rows"]}
    assert list(found) == ["zero-shot", "few-shot", "lora", "full"]
    assert found["full"]["value"] == 1.0 > found["zero-shot"]["value"]  # the class is the text's first word
    assert found["zero-shot"]["trained"] == 0 < found["lora"]["trained"] < found["full"]["trained"]
    assert found["zero-shot"]["peak"] is None and found["lora"]["peak"] > 10**8
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 and row["answers"] == 12 for row in found.values())
    again = command(*words)
    assert again.code == 0 and "tuning" not in again.err and "95 % interval" in again.out
    other = command(*words, "tuning.base_dtype=float32")
    assert "lora: tuning" in other.err  # other words, another run


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--compare", "lora"], "--compare: 'lora'; expected prompting"),
        (["--compare", "prompting", "--methods", "magic"], "--methods: 'magic'"),
        (["--compare", "prompting", "data.path=pairs.jsonl"], "rows of the form Pair"),
    ],
)
def test_what_it_refuses(command, tmp_path: Path, words: list[str], found: str) -> None:
    published(tmp_path / "model", "LlamaForCausalLM")
    Path("pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Path("rows.jsonl").write_text(rows(4))
    path = [] if any(word.startswith("data.path") for word in words) else ["data.path=rows.jsonl"]
    said = command("tune", "model", *path, *words)
    assert said.code in (2, 3) and found in said.err.splitlines()[-1], said.err


@torch.no_grad()
def test_likelihoods_of_names_are_those_of_the_whole_distribution() -> None:
    """Names of one to three tokens against a forward pass over prompt and name."""
    torch.manual_seed(0)
    model = headway.build({"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "max_len": 32}).eval()
    torch.nn.init.normal_(model.head.output.weight)
    names = [[3], [5, 9], [7, 2, 11], [3, 8]]
    for seed in range(8):
        prompt = torch.randint(40, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
        scores = []
        for name in names:
            said = torch.log_softmax(model(input_ids=torch.tensor([prompt + name])).logits[0], -1)
            scores.append(float(sum(said[5 + place, token] for place, token in enumerate(name))))
        assert torch.allclose(likelihoods(model, prompt, names), torch.tensor(scores), atol=1e-4)


def test_shots_are_the_rows_most_like_the_text_with_the_nearest_last() -> None:
    texts = ["the cat sat on the mat", "the dog ran", "a zebra crossed the road", "the zebra sat"]
    assert Likeness(texts).nearest("a zebra sat there", 2) == [3, 2]
    train = [Labelled(text, None, str(number % 2), "f:1") for number, text in enumerate(texts)]
    prompt = Task(train, train).few_shot(Labelled("a zebra sat there", None, "0", "f:9"), 2)
    assert prompt.endswith("Text: the zebra sat\nClass: 1\n\nText: a zebra sat there\nClass:")
    assert prompt.startswith("Classes: 0, 1.\n\nText: a zebra crossed the road\nClass: 0\n\n")
