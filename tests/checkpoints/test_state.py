"""Optimizer and random state there and back, exactly, without pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headway import files
from headway.checkpoints.state import flatten_state, unflatten_state
from headway.checkpoints.tensors import read_tensors, write_tensors
from headway.errors import BugError, InputError
from headway.strict import strict_json


def through_files(value: object, folder: Path) -> object:
    tensors, tree = flatten_state(value)
    files.write(folder / "t", write_tensors(tensors))
    text = json.dumps(tree, sort_keys=True, allow_nan=False)
    return unflatten_state(read_tensors(folder / "t"), strict_json(text, "tree"))


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()


@pytest.mark.fault("R7")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizer_and_generators_continue_byte_equal(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 2))
        return model, kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]

    model, optimizer = build()
    for _ in range(3):
        training_step(model, optimizer)
    philox = np.random.Generator(np.random.Philox(3))
    state = {
        "optimizer": optimizer.state_dict(),
        "model": dict(model.state_dict()),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": philox.bit_generator.state,
    }
    read = through_files(state, tmp_path)
    assert isinstance(read, dict)
    training_step(model, optimizer)
    drawn, numbers = random.random(), philox.random(3)

    other, fresh = build()
    other.load_state_dict(read["model"])
    fresh.load_state_dict(read["optimizer"])
    torch.set_rng_state(read["torch"])
    random.setstate(read["python"])
    again = np.random.Generator(np.random.Philox(0))
    again.bit_generator.state = read["numpy"]
    training_step(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert random.random() == drawn and (again.random(3) == numbers).all()


def test_keys_and_order_and_types(tmp_path: Path) -> None:
    value = {
        2: "int",
        "2": "str",
        (1, None): [(), [], {}],
        True: -0.0,
        "z": 1,
        "a": float("-inf"),
        1.5: 10**300,
    }
    read = through_files(value, tmp_path)
    assert read == value and isinstance(read, dict)
    assert [(type(k), k) for k in read] == [(type(k), k) for k in value]
    assert str(read[True]) == "-0.0" and type(read[(1, None)][0]) is tuple
    nan = through_files([float("nan")], tmp_path)
    assert isinstance(nan, list) and nan[0] != nan[0]


def test_paths_that_read_alike_do_not_collide(tmp_path: Path) -> None:
    value = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    read = through_files(value, tmp_path)
    assert isinstance(read, dict) and read["a/b"] == 1 and read["a"]["b"] == 2 and read[1] == 3 and read["1"] == 4
    bare = through_files(torch.arange(3), tmp_path)
    assert isinstance(bare, Tensor) and bare.tolist() == [0, 1, 2]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(
    st.characters(exclude_categories=["Cs"]))  # fmt: skip
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


@given(NESTED)
def test_any_nesting(value: object) -> None:
    tensors, tree = flatten_state(value)
    back = unflatten_state(tensors, strict_json(json.dumps(tree, sort_keys=True, allow_nan=False), "tree"))
    assert repr(back) == repr(value) and not tensors


def test_a_value_that_cannot_be_saved() -> None:
    with pytest.raises(BugError, match="state optimizer/0: a function"):
        flatten_state({"optimizer": [len and (lambda: None)]})


@pytest.mark.parametrize(
    "tree",
    [
        *({}, {"tensor": "absent"}, {"tensor": 1}, {"array": "absent"}, {"tuple": 1}, {"float": "1e400"}),
        *(
            {"pairs": [[1]]},
            {"pairs": 3},
            {"pairs": [[[1], 2]]},
            {"pairs": [], "x": 1},
            {"__reduce__": "os.system"},
        ),
    ],
)
def test_a_tree_we_did_not_write(tree: object) -> None:
    with pytest.raises(InputError, match=r"^run/state\.json: "):
        unflatten_state({"t": torch.ones(1)}, [tree], "run/state.json")
