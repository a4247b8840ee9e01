"""config.json files as they lie on huggingface.co, in the spelling of the release that wrote them; typed by hand.

What no reader needs (initializer_range, use_cache, generation settings) is kept where it is typical of the file.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def decoder(model_type: str, head: str, d: int, f: int, layers: int, heads: int, vocab: int, **keys: Any) -> Config:
    """The usual sizes under the usual names."""
    return {
        "architectures": [head], "model_type": model_type, "hidden_size": d, "intermediate_size": f,
        "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab, "hidden_act": "silu",
        "initializer_range": 0.02, "use_cache": True,
    } | keys  # fmt: skip


LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
PHI3 = decoder(
    "phi3", "Phi3ForCausalLM", 3072, 8192, 32, 32, 32064, num_key_value_heads=32, rms_norm_eps=1e-5,
    max_position_embeddings=131072, original_max_position_embeddings=4096, rope_theta=10000.0, sliding_window=262144,
    attention_bias=False, attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=32000, pad_token_id=32000, torch_dtype="bfloat16",
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
)  # fmt: skip
FACTORS = {
    "long_factor": [1 + i / 8 for i in range(48)],
    "short_factor": [1 + i / 100 for i in range(48)],
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_kv": 64, "d_ff": 2048, "n_positions": 512,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "dropout_rate": 0.1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "output_past": True,
    "vocab_size": 32128,
}  # fmt: skip
GEMMA3 = decoder(
    "gemma3_text", "Gemma3ForCausalLM", 1152, 6912, 26, 4, 262144, num_key_value_heads=1, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, rms_norm_eps=1e-6, sliding_window=512,
    sliding_window_pattern=6, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None, bos_token_id=2,
    eos_token_id=[1, 106], pad_token_id=0, attn_logit_softcapping=None, final_logit_softcapping=None,
    max_position_embeddings=32768, cache_implementation="hybrid", torch_dtype="bfloat16",
)  # fmt: skip
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "hidden_size": 768,
    "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12, "vocab_size": 50368,
    "max_position_embeddings": 8192, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
    "local_attention": 128, "local_rope_theta": 10000.0, "hidden_activation": "gelu", "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False, "decoder_bias": True,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_pooling": "mean", "reference_compile": None,
    "position_embedding_type": "absolute", "bos_token_id": 50281, "eos_token_id": 50282, "pad_token_id": 50283,
    "cls_token_id": 50281, "sep_token_id": 50282, "gradient_checkpointing": False, "torch_dtype": "float32",
}  # fmt: skip

OLD: dict[str, Config] = {
    "llama-1": decoder(
        "llama", LLAMA, 4096, 11008, 32, 32, 32000, rms_norm_eps=1e-6, max_sequence_length=2048, bos_token_id=0,
        eos_token_id=1, pad_token_id=-1, torch_dtype="float16",
    ),
    "llama-2": decoder(
        "llama", LLAMA, 4096, 11008, 32, 32, 32000, num_key_value_heads=32, rms_norm_eps=1e-5, pretraining_tp=1,
        max_position_embeddings=4096, rope_scaling=None, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        torch_dtype="float16", transformers_version="4.31.0.dev0",
    ),
    "llama-3.1": decoder(
        "llama", LLAMA, 4096, 14336, 32, 32, 128256, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=500000.0,
        max_position_embeddings=131072, attention_bias=False, mlp_bias=False, pretraining_tp=1, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], tie_word_embeddings=False, torch_dtype="bfloat16",
        rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    ),
    "llama-dynamic": decoder(
        "llama", LLAMA, 4096, 11008, 32, 32, 32000, max_position_embeddings=4096,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    ),
    "phi-3-128k": PHI3 | {"rope_scaling": {"type": "longrope", **FACTORS}},
    "phi-4-mini": PHI3 | {
        "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 36, "short_factor": [1.0] * 36},
        "partial_rotary_factor": 0.75, "sliding_window": None, "tie_word_embeddings": True,
    },
    "mistral-v0.1": decoder(
        "mistral", MISTRAL, 4096, 14336, 32, 32, 32000, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0,
        max_position_embeddings=32768, sliding_window=4096, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
    ),
    "mistral-v0.3": decoder(
        "mistral", MISTRAL, 4096, 14336, 32, 32, 32768, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0,
        max_position_embeddings=32768, sliding_window=None, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
    ),
    "mixtral": decoder(
        "mixtral", "MixtralForCausalLM", 4096, 14336, 32, 32, 32000, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=1000000.0, max_position_embeddings=32768, sliding_window=None, num_local_experts=8,
        num_experts_per_tok=2, output_router_logits=False, router_aux_loss_coef=0.02,
    ),
    "qwen2.5": decoder(
        "qwen2", "Qwen2ForCausalLM", 3584, 18944, 28, 28, 152064, num_key_value_heads=4, rms_norm_eps=1e-6,
        rope_theta=1000000.0, max_position_embeddings=131072, max_window_layers=28, sliding_window=131072,
        use_sliding_window=False, use_mrope=False, bos_token_id=151643, eos_token_id=151643, torch_dtype="bfloat16",
    ),
    "qwen2.5-yarn": decoder(
        "qwen2", "Qwen2ForCausalLM", 3584, 18944, 28, 28, 152064, num_key_value_heads=4, max_position_embeddings=131072,
        max_window_layers=20, sliding_window=4096, use_sliding_window=True,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "qwen3-coder": decoder(
        "qwen3_moe", "Qwen3MoeForCausalLM", 6144, 8192, 2, 96, 151936,  # of 62 layers
        num_key_value_heads=8, head_dim=128,
        moe_intermediate_size=2560, num_experts=160, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], rope_theta=10000000, max_position_embeddings=262144, use_sliding_window=False,
        sliding_window=None, max_window_layers=62, rms_norm_eps=1e-6,
    ),
    "gemma-2": decoder(
        "gemma2", "Gemma2ForCausalLM", 2304, 9216, 26, 8, 256000, num_key_value_heads=4, head_dim=256,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096, rope_theta=10000.0,
        rms_norm_eps=1e-6, max_position_embeddings=8192, cache_implementation="hybrid", bos_token_id=2, eos_token_id=1,
        pad_token_id=0, torch_dtype="float32",
    ),
    "gemma-3-1b": GEMMA3,
    "gemma-3-4b": GEMMA3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "num_hidden_layers": 34},
    "smollm3": decoder(
        "smollm3", "SmolLM3ForCausalLM", 2048, 11008, 36, 16, 128256, num_key_value_heads=4, rope_theta=5000000.0,
        no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, use_sliding_window=False, sliding_window=None,
        layer_types=None, max_position_embeddings=65536,
    ),
    "smollm3-windows": decoder(
        "smollm3", "SmolLM3ForCausalLM", 2048, 11008, 36, 16, 128256, num_key_value_heads=4, no_rope_layer_interval=4,
        use_sliding_window=True, sliding_window=512, layer_types=None,
    ),
    "pythia": decoder(
        "gpt_neox", "GPTNeoXForCausalLM", 512, 2048, 6, 8, 50304, hidden_act="gelu", rotary_pct=0.25,
        rotary_emb_base=10000, use_parallel_residual=True, layer_norm_eps=1e-5, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, torch_dtype="float16",
    ),
    "gpt-neox-scaled": decoder(
        "gpt_neox", "GPTNeoXForCausalLM", 512, 2048, 6, 8, 50304, hidden_act="gelu_fast", rotary_pct=0.5,
        rotary_emb_base=500, use_parallel_residual=False, rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "falcon-40b": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_kv_heads": 8, "vocab_size": 65024, "alibi": False, "bias": False,
        "new_decoder_architecture": True, "parallel_attn": True, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "bos_token_id": 11,
        "eos_token_id": 11, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "bos_token_id": 50256,
        "eos_token_id": 50256, "summary_type": "cls_index", "summary_activation": None,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "roberta": {
        "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "num_attention_heads": 12, "num_hidden_layers": 12,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "vocab_size": 50265,
    },
    "modernbert": MODERNBERT,
    "modernbert-other": MODERNBERT | {
        "global_attn_every_n_layers": 4, "global_rope_theta": 80000.0, "local_rope_theta": 500.0, "local_attention": 64,
    },
    "t5-small": T5 | {
        "d_model": 512, "num_heads": 8, "num_layers": 6,
        "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
    },
    "flan-t5": T5 | {
        "d_model": 768, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12, "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new", "is_gated_act": True, "relative_attention_max_distance": 128,
        "tie_word_embeddings": False,
    },
    "whisper-tiny.en": {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "d_model": 384,
        "encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4, "encoder_attention_heads": 6,
        "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "num_mel_bins": 80,
        "max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51864, "scale_embedding": False,
        "activation_function": "gelu", "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout": 0.0,
        "bos_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256, "decoder_start_token_id": 50257,
        "begin_suppress_tokens": [220, 50256], "forced_decoder_ids": [[1, 50362]], "max_length": 448,
        "is_encoder_decoder": True, "torch_dtype": "float32",
    },
    "vit": {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
        "id2label": {str(i): f"class {i}" for i in range(1000)}, "label2id": {f"class {i}": i for i in range(1000)},
        "image_size": 224, "layer_norm_eps": 1e-12, "num_attention_heads": 12, "num_channels": 3,
        "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True,
    },
}  # fmt: skip
