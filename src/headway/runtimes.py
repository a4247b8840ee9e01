"""In which other runtimes a model loads, and why not elsewhere: what `inspect` says and `convert` relies on."""

from __future__ import annotations

from headway.checkpoints.gguf_model import gguf_metadata
from headway.errors import HeadwayError
from headway.families import families
from headway.loading import Loaded
from headway.saving import family_for
from headway.text.gguf_vocab import to_gguf

# Architecture classes in vLLM's registry (vllm/model_executor/models/registry.py, read in 2026); those that it runs
# through transformers are among them.
VLLM = frozenset(
    """BloomForCausalLM FalconForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM
    GPTNeoXForCausalLM LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Olmo2ForCausalLM OPTForCausalLM
    Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM
    GPT2ForSequenceClassification BertModel ModernBertModel NomicBertModel RobertaForMaskedLM RobertaModel
    XLMRobertaModel BertForSequenceClassification BertForTokenClassification RobertaForSequenceClassification
    XLMRobertaForSequenceClassification WhisperForConditionalGeneration""".split()  # noqa: SIM905
)


def runtimes(loaded: Loaded) -> dict[str, str]:
    """{runtime: the reason why it cannot load the model, empty where it can}, by what the tables say."""
    try:
        family, architecture = family_for(loaded)
        theirs = ""
    except HeadwayError as error:
        return dict.fromkeys(("transformers", "vLLM", "llama.cpp"), str(error))
    vllm = "" if architecture in VLLM else f"its registry has no {architecture}"
    return {"transformers": theirs, "vLLM": vllm, "llama.cpp": _llama_cpp(loaded, family.model_type)}


def _llama_cpp(loaded: Loaded, model_type: str) -> str:
    try:
        gguf_metadata(loaded.config, families()[model_type])
        if loaded.tokenizer is not None:
            to_gguf(loaded.tokenizer)
    except HeadwayError as error:
        return str(error)
    return "" if loaded.tokenizer is not None else "it needs a tokenizer"
