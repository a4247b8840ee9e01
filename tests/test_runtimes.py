"""What `inspect` says of other runtimes is what happens there: yes where they load it, else the field by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_loading import REFERENCES, ROWS, TEXT, error_of, inputs, logits, published, sentence_transformer, tokenizer

from headway.config import ModelConfig
from headway.families import families
from headway.loading import Loaded, load
from headway.nn import Transformer
from headway.runtimes import VLLM, runtimes
from headway.saving import save

NAMES = ["transformers", "vLLM", "llama.cpp"]
YES = ""
# {class, with the variant: (words of vLLM's reason, of llama.cpp's)}
SAID: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": (YES, YES),
    "LlamaForCausalLM-tied": (YES, YES),
    "Qwen2ForCausalLM": (YES, YES),
    "Gemma2ForCausalLM": (YES, YES),
    "GPT2LMHeadModel": (YES, YES),
    "LlamaForCausalLM-rope-dynamic": (YES, "positions.scaling"),
    "Starcoder2ForCausalLM": (YES, "attention.pattern"),
    "LlamaForSequenceClassification": ("LlamaForSequenceClassification", "head.type (sequence-classification against"),
    "BertForMaskedLM": ("BertForMaskedLM", "head.type (masked-lm against pooled-embedding)"),
    "BertModel": (YES, "head.pool.dense"),
    "T5ForConditionalGeneration": ("T5ForConditionalGeneration", "no architecture for t5"),
    "WhisperForConditionalGeneration": (YES, "no architecture for whisper"),
    "ViTForImageClassification": ("ViTForImageClassification", "no architecture for vit"),
    "CLIPTextModelWithProjection": ("CLIPTextModelWithProjection", "no architecture for clip_text_model"),
}


@pytest.mark.parametrize("name", SAID)
def test_yes_or_the_reason(tmp_path: Path, name: str) -> None:
    """The reason is that of `save`, and a yes means that `save` writes what loads."""
    loaded = load(published(tmp_path / "in", name, None if "ViT" in name else "bpe"))
    found = runtimes(loaded)
    assert list(found) == NAMES and found["transformers"] == YES
    for reason, part in zip((found["vLLM"], found["llama.cpp"]), SAID[name], strict=True):
        assert bool(reason) is bool(part) and part in reason and "\n" not in reason, reason
    if found["llama.cpp"]:
        assert found["llama.cpp"] == str(error_of(save, loaded, tmp_path / "m.gguf", "gguf"))
    else:
        assert torch.equal(logits(load(save(loaded, tmp_path / "m.gguf", "gguf"))), logits(loaded))


def test_an_encoder_pooled_by_the_files_beside_it(tmp_path: Path) -> None:
    folder = sentence_transformer(tmp_path / "st", ["pooling_mode_mean_tokens"], True)
    assert runtimes(load(folder)) == dict.fromkeys(NAMES, YES)


def test_without_words_llama_cpp_has_no_vocabulary(tmp_path: Path) -> None:
    found = runtimes(load(published(tmp_path / "in", "LlamaForCausalLM", None)))
    assert "no tokenizer" in found["llama.cpp"] and found["transformers"] == found["vLLM"] == YES


def test_a_tokenizer_that_a_gguf_file_has_no_words_for(tmp_path: Path) -> None:
    """The model alone is not enough: characters as tokens are no vocabulary that llama.cpp knows."""
    from headway.text import train_tokenizer

    words = train_tokenizer([TEXT], "char", 60)
    loaded = load(published(tmp_path / "in", "LlamaForCausalLM", None))
    found = runtimes(
        Loaded(loaded.model, words, loaded.config, loaded.path, family="llama", architecture="LlamaForCausalLM")
    )
    assert found["llama.cpp"].startswith("tokenizer") and found["transformers"] == YES


def ours(**fields: Any) -> Loaded:
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": ROWS, "max_len": 24}
    llama = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope"}
    config = ModelConfig(**sizes | llama | fields)
    return Loaded(Transformer(config).eval(), tokenizer(), config, Path("run"))


def test_a_model_of_ours(tmp_path: Path) -> None:
    """Yes everywhere for what is a Llama in all but name; nowhere for what no published family has, and why."""
    llama = ours()
    assert runtimes(llama) == dict.fromkeys(NAMES, YES)
    save(llama, tmp_path / "out", "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(**inputs(llama)).logits
        assert (logits(llama) - expected).abs().max() < 1e-5 * expected.abs().max()
    found = runtimes(ours(attention={"softcap": 30.0}))
    assert list(found) == NAMES and len(set(found.values())) == 1
    assert "attention.softcap (30.0 against None)" in found["vLLM"]


def test_the_list_of_vllm_names_classes_that_families_have() -> None:
    known = {architecture for family in families().values() for architecture in family.heads}
    assert known >= VLLM
    assert {row.architecture for row in REFERENCES.values()} >= VLLM
