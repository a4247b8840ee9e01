"""SmolLM2-135M-Instruct from its GGUF file against transformers' Llama with the same numbers.

The reference takes nothing from this library: the gguf package unpacks the blocks, the names and the order of rotary
rows are undone here by hand (convert_hf_to_gguf.py in llama.cpp says what was done).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from real_data import smollm2, wikitext
from transformers import LlamaConfig, LlamaForCausalLM

import headway
from headway.evaluation import TextTokens, perplexity
from headway.loading import Loaded

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("smollm2")]

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The primary colours are",
    "In 1969, Neil Armstrong", "My favourite food is", "import numpy as np\n", "The opposite of hot is", "1, 2, 3, 4,",
    "Dear Sir or Madam,", "El perro come", "Photosynthesis is the process", "Q: What is 2 + 2?\nA:", "SELECT name FROM",
    "The quick brown fox", "Shakespeare wrote", "A triangle has", "To make bread you need", "The largest ocean is",
]  # fmt: skip


@functools.cache
def ours() -> Loaded:
    return headway.load(smollm2(), dtype=torch.float32)


@functools.cache
def theirs() -> LlamaForCausalLM:
    reader = GGUFReader(smollm2())
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}

    def halves(rows: np.ndarray, heads: int) -> np.ndarray:
        return rows.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(rows.shape)

    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj"}
    names |= {"attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    table = tensors["token_embd.weight"]
    state = {"model.norm.weight": tensors["output_norm.weight"], "model.embed_tokens.weight": table}
    for i in range(30):
        for one, other in names.items():
            value = tensors[f"blk.{i}.{one}.weight"]
            value = halves(value, 9) if one == "attn_q" else halves(value, 3) if one == "attn_k" else value
            state[f"model.layers.{i}.{other}.weight"] = value
    state["lm_head.weight"] = table
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()})
    return model


def test_logits() -> None:
    """Within 1e-3 as asked (the largest is about 30): 30 layers of float32 sums in another order. Found: about 1e-4."""
    ids = torch.tensor([ours().words.encode(wikitext("test")[:20000])[:512]])
    with torch.no_grad():
        difference = (ours().model(ids).logits - theirs()(ids).logits).abs().max().item()
    print(f"logits of 512 tokens: largest difference {difference:.1e}")
    assert difference < 1e-3


def test_greedy_text_of_20_prompts() -> None:
    """100 tokens of each, in one ragged batch here.

    A text is the greedy one if each of its tokens is the likeliest after those before it. So the reference reads ours,
    all places of a text at once, instead of writing its own one token at a time, which took most of this test's time.
    """
    rows = [ours().words.encode(prompt) for prompt in PROMPTS]
    found = headway.generate(ours(), rows, max_tokens=100, temperature=0.0, ignore_eos=True)
    equal = 0
    for row, one in zip(rows, found, strict=True):
        assert len(one.token_ids) == 100
        ids = torch.tensor([[*row, *one.token_ids[:-1]]])
        with torch.no_grad():
            likeliest = theirs()(ids, logits_to_keep=100).logits[0].argmax(-1)
        equal += likeliest.tolist() == list(one.token_ids)
    print(f"greedy text: {equal} of {len(PROMPTS)} equal")
    assert equal == len(PROMPTS)


def test_perplexity_of_some_windows() -> None:
    """The measure itself on the head of WikiText-2's test text, windows of 1,024 every 512 tokens, by hand there.

    The whole text takes half an hour on two cores: benchmarks/perplexity.py.
    """
    ids = ours().words.encode(wikitext("test"))[:3072]
    text = TextTokens.of(ids, ours().words)
    found = perplexity(ours().model, [text], context=1024, stride=512)
    total = count = 0.0
    with torch.no_grad():
        for begin in range(0, len(ids) - 512, 512):
            window = torch.tensor([ids[begin : begin + 1024]])
            new = window[0, 1:] if begin == 0 else window[0, 512:]  # what no window before has counted
            logits = theirs()(window, logits_to_keep=len(new) + 1).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, new, reduction="sum")
            total, count = total + loss.item(), count + len(new)
    print(f"perplexity of {count:.0f} tokens: {found.perplexity.value:.4f} and {np.exp(total / count):.4f}")
    assert found.perplexity.value == pytest.approx(np.exp(total / count), rel=1e-4)
