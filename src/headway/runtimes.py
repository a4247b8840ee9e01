"""In which other runtimes a model loads, and why not elsewhere: what `inspect` says and `convert` relies on."""

from __future__ import annotations

from headway.errors import HeadwayError
from headway.families import Family
from headway.loading import Loaded
from headway.saving import family_for, gguf_vocabulary

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
    except HeadwayError as error:
        return dict.fromkeys(("transformers", "vLLM", "llama.cpp"), str(error))
    vllm = "" if architecture in VLLM else f"its registry has no {architecture}"
    return {"transformers": "", "vLLM": vllm, "llama.cpp": _llama_cpp(loaded, family)}


def _llama_cpp(loaded: Loaded, family: Family) -> str:
    try:
        gguf_vocabulary(loaded, family)
    except HeadwayError as error:
        return str(error)
    return ""
