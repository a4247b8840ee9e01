"""Whisper (arXiv:2212.04356): a spectrogram through two convolutions, pre-norm stacks, keys without a bias."""

from headway.families._codecs import tokens
from headway.families._pair import FIXED, alike, keys, scaled, weights
from headway.families._table import Family, Head, Key, Node, Special

SOUND: dict[str, Node] = {"embeddings.audio.first": "encoder.conv1", "embeddings.audio.second": "encoder.conv2"}
BODY = weights("before", learned=True, embedding_norm=False, final_norm=True, keys_biased=False)
KEYS = keys(
    vocab_size=51865, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536
)

FAMILY = Family(
    model_type="whisper",
    source="arXiv:2212.04356; openai/whisper-tiny.en",
    fixed=FIXED | {"placement": "pre", "positions.type": "learned"},
    keys={key: value for key, value in KEYS.items() if key != "max_position_embeddings"}
    | {
        "max_target_positions": Key("max_len", 448),
        "num_mel_bins": Key("embeddings.audio.bins", 80),
        "dropout": Key("dropout", 0.0),
    },
    # The encoder's positions are half the frames, for the second convolution strides by two.
    special=(
        Special(
            lambda raw: {"embeddings.audio.frames": 2 * raw.get("max_source_positions", 1500)},
            lambda c: {"max_source_positions": c.embeddings.audio.count if c.embeddings.audio else None},
        ),
        scaled(),
        alike(),
        tokens(bos=50257, eos=50257, pad=50257, decoder_start=50257),
    ),
    weights={name: node for name, node in BODY.items() if name != "embeddings.tokens"} | SOUND,
    heads={"WhisperForConditionalGeneration": Head({"head.type": "causal-lm"}, {"head.output": "proj_out"}, "model.")},
)
