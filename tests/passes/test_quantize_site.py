"""A site says how a weight becomes codes; what it chooses does not show in a graph."""

import pytest
import torch

from qerl_compile.attach import Attacher
from qerl_compile.errors import FormatError
from qerl_compile.formats.nvfp4 import dequantize, quantize_group
from qerl_compile.formats.scale_search import search_group
from qerl_compile.passes import QuantizeSite
from qerl_compile.passes.quantize import packed_of
from qerl_compile.plan import Plan
from tests.passes.toy import linear

GROUP = ("q", "k")


def weights() -> dict[str, torch.Tensor]:
    return {name: linear(8, 64, seed=seed).weight.data for seed, name in enumerate(GROUP)}


def bits(packed) -> tuple[object, ...]:
    return (
        packed.codes_NK2.tolist(),
        packed.block_decode_scale_NG.view(torch.uint8).tolist(),
        packed.decode_scale.item(),
    )


@pytest.mark.parametrize("method", ["mse", "four_over_six"])
def test_a_group_is_packed_by_the_search_that_its_site_names(method):
    found, searched = QuantizeSite(scales=method).pack(weights()), search_group(weights(), method)
    plain = quantize_group(weights())
    for name, w in weights().items():
        assert bits(found[name]) == bits(searched[name])
        assert bits(found[name]) != bits(plain[name])
        error, of_plain = ((dequantize(p[name], torch.float32) - w).square().sum() for p in (found, plain))
        assert error < of_plain


def test_a_site_without_a_choice_writes_the_bytes_of_compressed_tensors():
    found = QuantizeSite().pack(weights())
    for name, packed in quantize_group(weights()).items():
        assert bits(found[name]) == bits(packed)


def test_modules_get_what_their_site_packs():
    module = torch.nn.ModuleDict({name: linear(8, 64, seed=seed) for seed, name in enumerate(GROUP)})
    plan = Plan((), quantize=dict.fromkeys(GROUP, QuantizeSite(scales="mse")), groups=(GROUP,))
    attacher = Attacher(module, plan)
    for name, w in weights().items():
        attacher.weight(name, w)
    attacher.finish()
    for name, packed in QuantizeSite(scales="mse").pack(weights()).items():
        held = packed_of(module[name])
        assert held is not None
        assert bits(held) == bits(packed)


@pytest.mark.parametrize("scales", ["amax", "mse", "four_over_six"])
def test_what_cannot_be_packed_is_named_whatever_the_search(scales):
    with pytest.raises(FormatError, match="k: expected finite weights"):
        QuantizeSite(scales=scales).pack({**weights(), "k": torch.full((8, 64), float("nan"))})
