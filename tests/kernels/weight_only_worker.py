"""Run by test_weight_only.py with TRITON_INTERPRET=1, which has to be set before Triton is imported."""

import itertools

import torch

from headway.kernels import weight_only
from headway.kernels.codes import _FORMS, Codes, lay_out

torch.manual_seed(0)
SHAPES = ((1, 32), (21, 96), (33, 160))
for (kind, form), (R, C) in itertools.product(_FORMS.items(), SHAPES):
    limit = {4: 16, 7: 128, 8: 256}[form.bits]
    groups = -(-C // form.group)
    scales = torch.randn(R, groups).to(torch.float16 if form.half else torch.float32)
    minima = torch.randn(R, groups).to(scales.dtype) if form.zero is None else None
    codes = torch.randint(0, limit, (R, C), dtype=torch.uint8)
    matrix = lay_out(Codes(codes, scales, minima, form.zero or 0), form.bits, min(form.group, 32), form.group)
    weights = matrix.weights()
    found = weight_only.unpack(matrix, torch.float32)
    # The sum code * scale + minimum may be fused into one rounding.
    assert (found - weights).abs().max() <= 1e-6 * weights.abs().max(), kind
    for T, dtype in ((1, torch.float32), (3, torch.float16), (weight_only.FEW + 1, torch.float32)):
        x, bias = torch.randn(T, C).to(dtype), torch.randn(R).to(dtype)
        exact = x.double() @ weights.double().T + bias.double()
        size = (x.abs().double() @ weights.abs().double().T).max()
        # float32 sums of at most 160 products; half precision rounds the answer, and the weights of many tokens.
        limit = 2e-6 if dtype == torch.float32 else 1e-3
        assert (weight_only.linear(x, matrix, bias) - exact).abs().max() < limit * size, (kind, R, C, T)
        wrong = weight_only.linear(x, matrix._replace(scales=matrix.scales * 2), bias)
        assert (wrong - exact).abs().max() > 2 * limit * size
    assert weight_only.linear(torch.empty(2, 0, C), matrix).shape == (2, 0, R)
print("done")
