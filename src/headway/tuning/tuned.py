"""A base with adapters on it, to be trained or used: what lies in the base's own files stays there."""

from __future__ import annotations

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.packed import weights_of
from headway.run_config import LowRankTuning
from headway.tuning.adapters import attach


def tuned(base: Transformer, config: ModelConfig, tuning: LowRankTuning, base_sha256: str) -> Transformer:
    """The base's weights as they are, codes too, with a new adapter; the same memory, frozen.

    Args:
        base: the model. config: its config, or with another head, which is new then and trained whole.
        tuning: see LowRankTuning. base_sha256: the hash of its weights, which a checkpoint of the adapters names.
    """
    weights = weights_of(base)
    is_new = config.head != base.config.head
    if is_new:
        fresh = Transformer(config).state_dict()
        weights = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        weights |= {name: tensor for name, tensor in fresh.items() if name.startswith("head.")}
    model = Transformer.of(config, weights)
    attach(model, tuning)
    if is_new:
        model.head.requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.elsewhere, model.base_sha256 = frozenset(model.state_dict()) - trained, base_sha256
    return model.train()
