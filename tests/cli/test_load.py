"""Loading a run folder: what does not belong together is refused, and each guard is needed."""

from __future__ import annotations

import json

import pytest
import torch

import headway
from headway import api, loading
from headway.checkpoints.folder import list_checkpoints, newest_good
from headway.config import ModelConfig
from headway.errors import HeadwayError, InputError
from headway.text import Tokenizer


def test_load_gives_the_model_that_was_trained(trained):
    loaded = headway.load(trained)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.step == 40 and loaded.weights_sha256 == newest_good(trained).manifest.weights and not loaded.notes
    state = torch.get_rng_state()
    again = headway.load(list_checkpoints(trained)[-1][1])
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing"
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)


def test_build_from_fields():
    model = headway.build({"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 9, "max_len": 4})
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 9)


@pytest.mark.fault("K14")
def test_a_damaged_newest_checkpoint_is_passed_over(own_run):
    steps = [step for step, _ in list_checkpoints(own_run)]
    path = list_checkpoints(own_run)[-1][1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    loaded = headway.load(own_run)
    assert loaded.step == steps[-2] and "passed over" in loaded.notes[0] and "sha256" in loaded.notes[0]


@pytest.mark.fault("T6")
def test_more_token_ids_than_embedding_rows(own_run, monkeypatch):
    tree = json.loads((own_run / "tokenizer.json").read_text())
    size = Tokenizer.load(own_run).vocab_size
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": size, "content": "<|more|>", "role": None})
    tree["added_tokens"][-1].pop("role")
    tree["added_tokens"][-1].pop("roles", None)
    (own_run / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(InputError) as caught:
        headway.load(own_run, force_tokenizer=True)
    text = str(caught.value)
    assert f"{size + 1} token ids" in text and str(size) in text and "tokenizer.json" in text and "model.json" in text
    # Without the guard such an id reaches the embedding.
    monkeypatch.setattr(loading, "check_rows", lambda *_, **__: None)
    with pytest.raises(IndexError):
        headway.load(own_run, force_tokenizer=True).model(torch.tensor([[size]]))


@pytest.mark.fault("T7")
def test_another_tokenizer_than_in_training(own_run, command):
    original = Tokenizer.load(own_run)
    tree = json.loads((own_run / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (own_run / "tokenizer.json").write_text(json.dumps(tree))
    other = Tokenizer.load(own_run)
    with pytest.raises(InputError) as caught:
        headway.load(own_run)
    assert original.hash in str(caught.value) and other.hash in str(caught.value)
    said = command("generate", own_run, "-p", "the")
    assert said.code == 3 and "--force-tokenizer" in said.error
    assert command("generate", own_run, "-p", "the", "--max-tokens", 1, "--force-tokenizer").code == 0
    assert original.encode("ab") != headway.load(own_run, force_tokenizer=True).tokenizer.encode("ab")


@pytest.mark.fault("F9")
@pytest.mark.parametrize(("field", "value"), [("d_ff", 64), ("n_kv_heads", 1), ("vocab_size", 512)])
def test_config_and_weights_disagree(own_run, field, value):
    tree = json.loads((own_run / "model.json").read_text())
    (own_run / "model.json").write_text(json.dumps({**tree, field: value}))
    with pytest.raises(InputError) as caught:
        headway.load(own_run)
    text = str(caught.value)
    assert "tensor " in text and text.count("(") >= 2 and "model.json" in text


@pytest.mark.fault("F9")
def test_missing_and_surplus_tensors_are_counted(own_run):
    tree = json.loads((own_run / "model.json").read_text())
    (own_run / "model.json").write_text(json.dumps({**tree, "n_layers": 3}))
    with pytest.raises(InputError, match=r"8 missing \(decoder.blocks.2"):
        headway.load(own_run)
    (own_run / "model.json").write_text(json.dumps({**tree, "n_layers": 1}))
    with pytest.raises(InputError, match=r"8 surplus \(decoder.blocks.1"):
        headway.load(own_run)


@pytest.mark.fault("F9")
def test_a_config_that_asks_for_more_takes_no_memory(own_run):
    tree = json.loads((own_run / "model.json").read_text())
    (own_run / "model.json").write_text(json.dumps({**tree, "d_ff": 2**36}))
    with pytest.raises(InputError, match="shape"):
        headway.load(own_run)


@pytest.mark.parametrize("text", ["", "[]", '{"d_model": 3}', "{", '{"d_model": NaN}'])
def test_a_broken_model_json(own_run, text):
    (own_run / "model.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.json"):
        headway.load(own_run)


@pytest.mark.parametrize("name", ["", "nothing", "file.txt", "empty"])
def test_places_that_are_no_run(tmp_path, name):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadwayError) as caught:
        headway.load(tmp_path / name)
    assert caught.value.exit_code == 3


@pytest.mark.fault("G19")
def test_an_encoder_does_not_write(trained):
    config = ModelConfig(kind="encoder", d_model=16, n_layers=1, n_heads=2, vocab_size=400, max_len=16)
    loaded = api.Loaded(headway.build(config), Tokenizer.load(trained), config, trained)
    with pytest.raises(HeadwayError) as caught:
        headway.generate(loaded, "the")
    assert caught.value.exit_code == 2 and "encoder-only" in str(caught.value)
