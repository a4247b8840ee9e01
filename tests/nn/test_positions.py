"""Every position scheme against transformers' own code, or the formula of its paper in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.t5.modeling_t5 import T5Attention

from headway import config as cfg
from headway.kernels.training import rotate
from headway.nn import Transformer
from headway.nn.positions import Rope, ScoreBias, alibi_slopes, relative_buckets, rope_frequencies, sinusoidal

# transformers computes frequencies and angles in float32: 6e-8 relative, over angles of at most 40 radians.
LIBRARY = 1e-5
H = 16


# --- frequencies -------------------------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 8.0, "original_len": 256}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"type": "none"},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0, "original_len": 32},
    "yarn": YARN,
    "yarn, other betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, ramp not rounded": YARN | {"truncate": False},
    "yarn, own attention factor": YARN | {"attention_factor": 1.3},
    "yarn, two mscales": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, equal mscales": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},  # DeepSeek-V2: they cancel to 1
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, ramp beyond the last frequency": YARN | {"original_len": 4096},
    "yarn, factor below 1": YARN | {"factor": 0.5},
    "llama3": {"type": "llama3", "factor": 8.0, "original_len": 256},
    "llama3, other band": {
        "type": "llama3", "factor": 32.0, "original_len": 128, "low_freq_factor": 0.5, "high_freq_factor": 8.0,
    },
    "longrope": {"type": "longrope", "original_len": 32},
    "longrope, own attention factor": {"type": "longrope", "original_len": 32, "attention_factor": 1.4},
}  # fmt: skip
OURS_TO_THEIRS = {"original_len": "original_max_position_embeddings", "short": "short_factor", "long": "long_factor"}


def rope(scaling: dict[str, Any], fraction: float = 1.0, theta: float = 10000.0, layout: str = "half") -> cfg.Rope:
    """Our description; longrope gets one divisor per pair."""
    pairs = int(H * fraction) // 2
    if scaling["type"] == "longrope":
        lists = {"short": [1 + 0.1 * i for i in range(pairs)], "long": [1 + 0.7 * i * i for i in range(pairs)]}
        scaling = scaling | lists
    return cfg.Rope.model_validate({"theta": theta, "fraction": fraction, "layout": layout, "scaling": scaling})


def theirs(ours: cfg.Rope, max_len: int) -> LlamaConfig:
    """The same description for transformers."""
    values = {k: v for k, v in ours.scaling.model_dump().items() if v is not None}
    kind = values.pop("type")
    parameters = {OURS_TO_THEIRS.get(name, name): value for name, value in values.items()}
    parameters |= {"rope_type": "default" if kind == "none" else kind, "rope_theta": ours.theta}
    if ours.fraction != 1.0:
        parameters["partial_rotary_factor"] = ours.fraction
    # Its dynamic scaling reads the original length from the model, and our longrope the longest one.
    longest = parameters.pop("original_max_position_embeddings") if kind == "dynamic" else max_len
    return LlamaConfig(
        hidden_size=2 * H, num_attention_heads=2, max_position_embeddings=longest, rope_parameters=parameters
    )


def library_frequencies(ours: cfg.Rope, length: int, max_len: int) -> tuple[Tensor, float]:
    """(R/2,) and the attention factor, by transformers."""
    config = theirs(ours, max_len)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return neox.GPTNeoXRotaryEmbedding.compute_default_rope_parameters(config)  # Llama's takes no fraction
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("length", [8, 32, 33, 100])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_frequencies_equal_transformers(scaling: dict[str, Any], fraction: float, theta: float, length: int) -> None:
    """Lengths on both sides of the original one; partial rotary shortens the exponent's range."""
    ours = rope(scaling, fraction, theta)
    frequencies, factor = rope_frequencies(ours, H, length, 128)
    expected, expected_factor = library_frequencies(ours, length, 128)
    assert frequencies.dtype == torch.float64 and frequencies.shape == expected.shape
    assert torch.allclose(frequencies, expected.double(), rtol=LIBRARY, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_the_scalings_differ_from_each_other() -> None:
    """Negative control: were a scaling ignored, its frequencies would be those of another row of the table."""
    found = [rope_frequencies(rope(scaling), H, 100, 128) for scaling in SCALINGS.values()]
    texts = {str([f"{x:.6g}" for x in (*frequencies.tolist(), factor)]) for frequencies, factor in found}
    same = ("yarn, two mscales", "yarn, equal mscales", "yarn, own attention factor")
    assert len(texts) == len(SCALINGS) - 1, "only a lone mscale means the same as none"
    assert len({rope_frequencies(rope(SCALINGS[name]), H, 100, 128)[1] for name in same}) == 3


@pytest.mark.parametrize("factor", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_ntk_equals_its_formula(factor: float, fraction: float) -> None:
    """b' = b s^(R / (R - 2)), so frequency i is divided by s^(2i / (R - 2)) (arXiv:2309.00071, definition 1).

    The highest stays, the lowest is divided by s; and transformers' dynamic scaling with factor 1 grows b the same way.
    """
    R, ours = int(H * fraction), rope({"type": "ntk", "factor": factor}, fraction)
    found, attention = rope_frequencies(ours, H, 8, 128)
    i = np.arange(R // 2)
    assert np.allclose(found.numpy(), 10000.0 ** (-2 * i / R) * factor ** (-2 * i / (R - 2)), rtol=1e-12)
    assert found[0] == 1 and attention == 1.0
    assert found[-1].item() == pytest.approx(10000.0 ** (-(R - 2) / R) / factor, rel=1e-12)
    twin = rope({"type": "dynamic", "factor": 1.0, "original_len": 32}, fraction)
    assert torch.allclose(found, library_frequencies(twin, int(32 * factor), 128)[0].double(), rtol=LIBRARY)


@pytest.mark.parametrize("max_len,original", [(128, 32), (32, 32), (16, 32), (131072, 4096)])
def test_longrope_attention_factor(max_len: int, original: int) -> None:
    """sqrt(1 + ln(L / L0) / ln(L0)), 1 where nothing is stretched (Phi-3 model card)."""
    ours = rope({"type": "longrope", "original_len": original})
    expected = math.sqrt(1 + math.log(max_len / original) / math.log(original)) if max_len > original else 1.0
    assert rope_frequencies(ours, H, 8, max_len)[1] == pytest.approx(expected, rel=1e-12)
    assert library_frequencies(ours, 8, max_len)[1] == pytest.approx(expected, rel=1e-12)


# --- turning queries and keys ------------------------------------------------------------------------------------


def qk(T: int = 40, N: int = 3) -> tuple[Tensor, Tensor]:
    """(B, T, N, H) float32."""
    return torch.randn(2, T, N, H), torch.randn(2, T, N, H)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_half_layout_equals_llama(scaling: dict[str, Any]) -> None:
    """Table, attention factor and rotation together, at the positions of a whole sequence of 40."""
    q, k = qk()
    positions, ours = torch.arange(40)[None], rope(scaling)
    angles = Rope(ours, H, 128).angles(positions, q, torch.tensor([[40]]))
    # length-dependent scalings are updated by its forward to the length it sees
    cos, sin = llama.LlamaRotaryEmbedding(theirs(ours, 128))(q, positions)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for one, other in zip((q, k), expected, strict=True):
        assert torch.allclose(rotate(one, angles, "half"), other, atol=LIBRARY * 4)  # values reach 4


def test_interleaved_layout_equals_gptj() -> None:
    q, _ = qk()
    sin, cos = gptj.create_sinusoidal_positions(40, H)[None].chunk(2, -1)
    angles = Rope(rope({"type": "none"}), H, 64).angles(torch.arange(40)[None], q)
    expected = gptj.apply_rotary_pos_emb(q, sin, cos)
    assert torch.allclose(rotate(q, angles, "interleaved"), expected, atol=LIBRARY * 4)
    assert not torch.allclose(rotate(q, angles, "half"), expected, atol=0.1)  # negative control


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_partial_rotary_equals_gpt_neox(fraction: float) -> None:
    """The first quarter or half of each head is turned, the rest passes through untouched."""
    q, k = qk()
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}
    config = GPTNeoXConfig(hidden_size=2 * H, num_attention_heads=2, rope_parameters=parameters)
    positions = torch.arange(40)[None]
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q, positions)
    angles = Rope(rope({"type": "none"}, fraction), H, 64).angles(positions, q)
    expected = neox.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for one, other in zip((q, k), expected, strict=True):
        found = rotate(one, angles, "half")
        assert torch.allclose(found, other, atol=LIBRARY * 4)
        assert torch.equal(found[..., int(H * fraction) :], one[..., int(H * fraction) :])


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distance_only(layout: str, fraction: float, scaling: str) -> None:
    """<R_m q, R_n k> = g(q, k, n - m) (arXiv:2104.09864, equation 11)."""
    q, k = torch.randn(2, 1, 1, 1, H, dtype=torch.float64)
    module = Rope(rope(SCALINGS[scaling], fraction, layout=layout), H, 2000)

    def score(m: int, n: int) -> float:
        turned = [
            rotate(x, module.angles(torch.tensor([[at]]), x), layout) for x, at in ((q, m), (k, n))
        ]  # float64 throughout: angles of up to 2000 radians keep 12 digits
        return float((turned[0] * turned[1]).sum())

    for distance in (0, 1, 7, 100):
        scores = [score(m, m + distance) for m in (0, 1, 13, 1500)]
        assert max(scores) - min(scores) < 1e-10 * max(1, abs(scores[0]))
    assert abs(score(0, 1) - score(0, 7)) > 1e-3  # and on the distance it does depend


def test_angles_follow_explicit_positions() -> None:
    """Padding, packing and caches pass positions; row b at position p is row p of the table."""
    module, q = Rope(rope({"type": "none"}), H, 64), qk(4)[0]
    positions = torch.tensor([[0, 0, 1, 2], [5, 6, 0, 1]])
    table = module.angles(torch.arange(64)[None], q)[0]
    assert torch.equal(module.angles(positions, q), table[positions])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_angles_are_per_row(kind: str) -> None:
    """A row declared short and a row declared long each turn by their own frequencies."""
    module, q = Rope(rope(SCALINGS[kind]), H, 128), qk(5)[0]
    lengths = (20, 100)
    found = module.angles(torch.arange(5)[None].expand(2, -1), q.double(), torch.tensor(lengths)[:, None])
    for row, length in zip(found, lengths, strict=True):
        frequencies, factor = library_frequencies(module.config, length, 128)
        expected = torch.arange(5)[:, None] * frequencies.double()
        assert torch.allclose(row[:, 0], torch.polar(torch.full_like(expected, factor), expected), atol=LIBRARY)
    assert not torch.allclose(found[0], found[1])


# --- biases on the scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets,longest", [(32, 128), (64, 256), (8, 10), (4, 5), (32, 20)])
def test_relative_buckets_equal_t5(buckets: int, longest: int, bidirectional: bool) -> None:
    """At every distance up to 5000 on either side: far beyond the last bucket."""
    distance = torch.arange(-5000, 5001)
    found = relative_buckets(distance, cfg.Relative(buckets=buckets, max_distance=longest), bidirectional=bidirectional)
    expected = T5Attention._relative_position_bucket(distance, bidirectional, buckets, longest)
    assert torch.equal(found, expected)
    assert found.min() == 0 and found.max() == buckets - 1


def test_relative_bias_reads_the_table_at_key_minus_query() -> None:
    """(1, N, T, S): head n, query t, key s."""
    bias = ScoreBias(cfg.Relative(buckets=8, max_distance=16), 3, bidirectional=True)
    bias.table.data = torch.randn(8, 3)
    q, k = torch.tensor([[4, 5]]), torch.arange(9)[None]
    out = bias(q, k, torch.float32)
    assert out.shape == (1, 3, 2, 9)
    for n, t, s in np.ndindex(3, 2, 9):
        bucket = T5Attention._relative_position_bucket(torch.tensor(s - int(q[0, t])), True, 8, 16)
        assert out[0, n, t, s] == bias.table[bucket, n]


@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 12, 16, 20, 71])
def test_alibi_equals_bloom(n_heads: int) -> None:
    """Bloom adds slope * key position; a softmax cannot tell that from -slope * distance under a causal mask."""
    T = 9
    theirs = build_alibi_tensor(torch.ones(1, T), n_heads, torch.float32).double()  # (N, 1, S)
    assert torch.allclose(alibi_slopes(n_heads), theirs[:, 0, 1], rtol=1e-6)
    order = torch.arange(T)[None]
    ours = ScoreBias(cfg.Alibi(), n_heads, bidirectional=False)(order, order, torch.float64)[0]
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril()
    weights = [x.expand(-1, T, T).masked_fill(hidden, -math.inf).softmax(-1) for x in (ours, theirs)]
    assert torch.allclose(*weights, atol=1e-6)


def test_alibi_of_eight_heads_is_that_of_the_paper() -> None:
    """1/2, 1/4, ... 1/256 (arXiv:2108.12409, section 3); symmetric where the mask is not causal."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    bias = ScoreBias(cfg.Alibi(), 8, bidirectional=True)(torch.tensor([[3]]), torch.arange(7)[None], torch.float64)
    assert bias[0, 1, 0].tolist() == [-0.25 * abs(s - 3) for s in range(7)]


# --- vectors added to the embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_interleaved_sinusoids_equal_the_paper(theta: float) -> None:
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = cos(...) (arXiv:1706.03762, section 3.5)."""
    D, positions = 12, torch.tensor([[0, 1, 2, 3], [100, 5000, 100000, 7]])
    found = sinusoidal(positions, D, cfg.Sinusoidal(theta=theta))
    for b, t, d in np.ndindex(2, 4, D):
        angle = int(positions[b, t]) / theta ** (2 * (d // 2) / D)
        # The table is float32 (6e-8); its angles must not be, or position 100000 would be off by 1e-2.
        assert found[b, t, d].item() == pytest.approx(math.cos(angle) if d % 2 else math.sin(angle), abs=1e-7)


def test_split_sinusoids_equal_marian() -> None:
    expected = MarianSinusoidalPositionalEmbedding(50, 12).create_weight()
    found = sinusoidal(torch.arange(50)[None], 12, cfg.Sinusoidal(layout="split"))[0]
    assert torch.allclose(found, expected, atol=1e-7)
    other = sinusoidal(torch.arange(50)[None], 12, cfg.Sinusoidal(layout="interleaved"))[0]
    assert not torch.allclose(other, expected, atol=0.1)


def embedded(model: Transformer, ids: Tensor, real: Tensor | None) -> Tensor:
    """What enters the first block."""
    found: list[Tensor] = []
    handle = model.embeddings.register_forward_hook(lambda module, arguments, output: found.append(output))
    model(ids, attention_mask=real)
    handle.remove()
    return found[0].detach()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_learned_positions_equal_opt_and_roberta(side: str) -> None:
    """Both skip two rows of the table and count real tokens only, OPT by its mask, RoBERTa by its padding id 1."""
    model = learned_model(offset=2)
    ids, real = torch.randint(2, 20, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    if side != "none":
        real[1, 3:] = 0
        real = real if side == "right" else real.flip(1)
    ids = ids.masked_fill(real == 0, 1)
    table = model.embeddings.learned.weight
    opt = OPTLearnedPositionalEmbedding(8, 6)
    opt.weight = table
    roberta = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
    found = embedded(model, ids, None if side == "none" else real) - model.embeddings.tokens(ids)
    for expected in (opt(real), table[roberta]):
        # One float32 sum and one difference of values near 0.02.
        assert torch.allclose(found[real.bool()], expected[real.bool()], atol=1e-8)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_begin_at_the_offset(offset: int) -> None:
    """The table has room for max_len positions behind the skipped rows."""
    model, ids = learned_model(offset), torch.randint(20, (1, 8))
    table = model.embeddings.learned.weight
    assert len(table) == 8 + offset
    found = embedded(model, ids, None) - model.embeddings.tokens(ids)
    assert torch.allclose(found[0], table[offset:], atol=1e-8)


def learned_model(offset: int) -> Transformer:
    positions = {"type": "learned", "offset": offset}
    return Transformer(
        cfg.ModelConfig(kind="encoder", d_model=6, n_layers=1, n_heads=2, vocab_size=20, max_len=8, positions=positions)
    )
