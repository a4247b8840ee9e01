"""A base to be adapted or used with what adapted it: what lies in the base's own files stays there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from headway.config import ModelConfig
from headway.nn import Transformer
from headway.nn.block import Block
from headway.nn.packed import PackedLinear, weights_of
from headway.tuning.adapters import attach
from headway.tuning_config import Frugal, PartialTuning


def tuned(base: Transformer, config: ModelConfig, tuning: Frugal, base_sha256: str) -> Transformer:
    """The base's weights as they are, codes too, with new adapters or some of them to be trained; the rest frozen.

    Args:
        base: the model. config: its config, or with another head, which is new then and trained whole.
        tuning: see tuning_config. base_sha256: the hash of its weights, which a checkpoint of what is trained names.
    """
    weights = weights_of(base)
    is_new = config.head != base.config.head
    if is_new:
        fresh = Transformer(config).state_dict()
        weights = {name: weight for name, weight in weights.items() if not name.startswith("head.")}
        weights |= {name: tensor for name, tensor in fresh.items() if name.startswith("head.")}
    model = Transformer.of(config, weights)
    if isinstance(tuning, PartialTuning):
        _release(model, tuning)
    else:
        attach(model, tuning)
    if is_new:
        model.head.requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.elsewhere, model.base_sha256 = frozenset(model.state_dict()) - trained, base_sha256
    return model.train()


def _release(model: Transformer, tuning: PartialTuning) -> None:
    """Train some of a frozen model's weights, each on a copy of its own: the base keeps what it has."""
    stack = model.decoder or model.encoder
    assert stack is not None
    last = list(stack.blocks)[len(stack.blocks) - tuning.layers :] if tuning.layers else []
    for block in last:
        assert isinstance(block, Block)
        _unpack(block)
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False):
            if (is_norm and tuning.norms) or (name == "bias" and tuning.biases):
                parameter.requires_grad_(True)
    for block in last:
        block.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def _unpack(block: Block) -> None:
    """Layers in codes become layers of floats."""
    for path, leaf in list(_packed(block)):
        rows, columns = leaf.shape
        plain = nn.Linear(columns, rows, bias=leaf.bias is not None, device="meta")
        plain.weight = nn.Parameter(leaf.packed.unpack())
        if leaf.bias is not None:
            plain.bias = leaf.bias
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, plain.train(leaf.training))


def _packed(block: Block) -> Iterator[tuple[str, PackedLinear]]:
    return ((path, leaf) for path, leaf in block.named_modules() if isinstance(leaf, PackedLinear))
