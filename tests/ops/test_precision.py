"""float32 stays float32, whichever library multiplies; exact mode asks nobody for more speed."""

import pytest
import torch

from temper.core.types import Run
from temper.ops import precision

SETTINGS = torch.backends.mkldnn.matmul


def test_the_setting_is_there_inside_alone_and_exact_mode_wins():
    before = SETTINGS.fp32_precision
    with precision.float32_products(Run()):
        assert SETTINGS.fp32_precision == ("bf16" if precision._onednn_keeps_float32() else "ieee")
        with precision.float32_products(Run(exact=True)):
            assert SETTINGS.fp32_precision == "ieee"
        assert SETTINGS.fp32_precision != "ieee" or not precision._onednn_keeps_float32()
    assert SETTINGS.fp32_precision == before
    with precision.autocast(Run(precision="bf16")):
        assert SETTINGS.fp32_precision == before


@pytest.mark.parametrize("shape", [(3, 64, 32), (64, 576, 1536), (16, 256, 8192)])
def test_products_have_float32_accuracy(shape):
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(out, width, generator=generator)
    exact = x.double() @ weight.double().T
    with precision.float32_products(Run()):
        found = torch.nn.functional.linear(x, weight)
    assert float((found - exact).abs().max()) < 1e-5 * width**0.5


def test_a_library_that_rounds_is_not_asked(monkeypatch):
    """A processor with bf16 matrix units: products come back with bf16's error."""
    product = torch.Tensor.__matmul__

    def rounding(one, two):
        if one.dtype == torch.float32 and SETTINGS.fp32_precision == "bf16":
            return product(one.bfloat16(), two.bfloat16()).float()
        return product(one, two)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    precision._onednn_keeps_float32.cache_clear()
    try:
        assert not precision._onednn_keeps_float32()
    finally:
        precision._onednn_keeps_float32.cache_clear()
