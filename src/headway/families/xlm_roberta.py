"""XLM-RoBERTa (arXiv:1911.02116): RoBERTa over a hundred languages, a Unigram vocabulary."""

from dataclasses import replace

from headway.families.roberta import FAMILY as ROBERTA
from headway.families.roberta import heads

FAMILY = replace(
    ROBERTA,
    model_type="xlm-roberta",
    source="arXiv:1911.02116; FacebookAI/xlm-roberta-base",
    heads=heads("XLMRoberta"),
)
