"""RoBERTa (arXiv:1907.11692): BERT without sentence types, positions that begin behind the padding id."""

from headway.families._codecs import labels, tokens
from headway.families._encoder import CLASSES, FIXED, KEYS, POOLER, WEIGHTS, masked_lm, offset_positions, token_heads
from headway.families._table import Family, Head


def heads(name: str) -> dict[str, Head]:
    """The heads under the class names of RoBERTa or of a model of its form."""
    classifier = {"head.pool.dense": "classifier.dense", "head.output": "classifier.out_proj"}
    return {
        f"{name}ForMaskedLM": masked_lm(
            "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias", "roberta.", gelu=True
        ),
        f"{name}Model": Head(POOLER, {"head.pool.dense": "pooler.dense"}),
        f"{name}ForSequenceClassification": Head(CLASSES | {"head.transform": "tanh"}, {**classifier}, "roberta."),
        **token_heads(name, "roberta."),
    }


FAMILY = Family(
    model_type="roberta",
    source="arXiv:1907.11692; FacebookAI/roberta-base",
    fixed=FIXED,
    keys={key: value for key, value in KEYS.items() if key != "max_position_embeddings"},
    special=(offset_positions(), tokens(bos=0, eos=2, pad=1), labels()),
    weights=WEIGHTS,
    heads=heads("Roberta"),
    only={"add_cross_attention": False, "is_decoder": False},
    unread=("*position_ids", "*pooler.*", "lm_head.decoder.bias"),
)
