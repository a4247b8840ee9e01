"""DINOv2 (arXiv:2304.07193): ViT with a learned scale on every branch; the giant one is gated."""

from headway.config import ModelConfig
from headway.families._codecs import Raw
from headway.families._encoder import BARE
from headway.families._table import Family, Head, Key, Node, Special, choice
from headway.families._vision import ATTENTION, DROPOUTS, FIXED, MODULES, body, keys

PARTS: dict[str, Node] = ATTENTION | {
    "attention_residual.before": "norm1",
    "attention_residual.scale": "layer_scale1.lambda1",
    "feed_forward_residual.before": "norm2",
    "feed_forward_residual.scale": "layer_scale2.lambda1",
    "feed_forward.up": choice("feed_forward.gated", {True: "mlp.weights_in", False: "mlp.fc1"}),
    "feed_forward.down": choice("feed_forward.gated", {True: "mlp.weights_out", False: "mlp.fc2"}),
}


def feed_forward(raw: Raw) -> dict[str, object]:
    """The size by `mlp_ratio`; gated, two thirds of it, rounded up to a multiple of eight."""
    size, gated = int(raw.get("hidden_size", 768) * raw.get("mlp_ratio", 4)), raw.get("use_swiglu_ffn", False)
    out: dict[str, object] = {"feed_forward.gated": gated, "d_ff": (int(size * 2 / 3) + 7) // 8 * 8 if gated else size}
    return out | ({"feed_forward.activation": "silu"} if gated else {})


def feed_forward_keys(config: ModelConfig) -> dict[str, object]:
    """The inverse of `feed_forward`."""
    gated = config.feed_forward.gated
    ratio = config.d_ff * (1.5 if gated else 1) / config.d_model
    return {"use_swiglu_ffn": gated, "mlp_ratio": round(ratio) if gated or ratio == int(ratio) else ratio}


FAMILY = Family(
    model_type="dinov2",
    source="arXiv:2304.07193; facebook/dinov2-small",
    fixed=FIXED,
    keys={key: value for key, value in keys(layer_norm_eps=1e-6).items() if key != "intermediate_size"}
    | DROPOUTS
    | {"layerscale_value": Key("layer_scale", 1.0)},
    special=(Special(feed_forward, feed_forward_keys),),
    weights=body(PARTS),
    heads={"Dinov2Model": Head(BARE)},
    unread=("*mask_token",),
    modules=MODULES,
)
