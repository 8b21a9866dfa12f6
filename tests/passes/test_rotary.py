"""Bias and rotary embedding inside the attention operator: text, numbers, whole models, and what must stay outside."""

# ruff: noqa: E501  # graph text

import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from qerl_compile.passes import Rotary
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.transforming import transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.passes.toy import Toy

B, H, J, D, PAGE = 3, 4, 2, 16, 4
DECODE = torch.ops.qerl.paged_decode


def half_turn(toy, x, half=D // 2):
    high = toy.call(operator.getitem, x, (..., slice(half, None)))
    low = toy.call(operator.getitem, x, (..., slice(None, half)))
    return toy.call(torch.cat, [toy.call(operator.neg, high), low], -1)


def embedded(toy, x, cos, sin, turn=half_turn):
    plain = toy.call(operator.mul, x, cos)
    return toy.call(operator.add, plain, toy.call(operator.mul, turn(toy, x), sin))


def decode(
    *, bias=True, order=(0, 1, 2), rotate=embedded, rotate_k=None, tables=(B, 1, D), dtype=torch.float32, **types
):
    """What a decode graph has from the projection on; lengths 1, 0 and 6 in pages of four positions."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    toy, width = Toy(), (H + 2 * J) * D
    whole = toy.input("p", random(B, 1, width, dtype=types.get("projected", dtype)))
    if bias:
        whole = toy.call(operator.add, whole, toy.input("bias", random(width)))
    split = toy.call(torch.functional.split, whole, [H * D, J * D, J * D], -1)
    parts = [toy.call(operator.getitem, split, index) for index in order]
    views = [toy.call(torch.reshape, part, (B, 1, -1, D)) for part in parts]
    q, k, v = (toy.call(torch.transpose, view, 1, 2) for view in views)
    cos, sin = (
        toy.call(torch.unsqueeze, toy.input(name, random(*tables, dtype=types.get("tables", dtype))), 1)
        for name in ("cos", "sin")
    )
    q, k = rotate(toy, q, cos, sin), (rotate_k or rotate)(toy, k, cos, sin)
    if types:
        v = toy.call(torch.Tensor.float, v)
    new = [toy.call(torch.squeeze, x, 2) for x in (q, k, v)]
    pages = [toy.input(name, random(7, J, PAGE, D)) for name in ("pages_k", "pages_v")]
    table = toy.input("table", torch.tensor([[3, 1], [0, 0], [5, 2]], dtype=torch.int32))
    length = toy.input("length", torch.tensor([1, 0, 6], dtype=torch.int32))
    return toy.output(toy.call(DECODE, *new, *pages, table, length, 0.25, 0))


def results(toy):
    """What the program returns, and the pages after it; the pages before it are put back."""
    pages = [toy.args[toy.program.inputs[name]] for name in ("pages_k", "pages_v")]
    before = [x.clone() for x in pages]
    (y,) = toy.run()
    after = [x.clone() for x in pages]
    for x, kept in zip(pages, before, strict=True):
        x.copy_(kept)
    return [y, *after]


def calls(toy):
    return [node for node in toy.program.graph.nodes if node.op.startswith("call") and "paged" in node.name]


def test_bias_and_embedding_move_into_the_operator():
    assert_expected_inline(
        decode().rewrite(Rotary()),
        """\
p: float32[3, 1, 128] = input
bias: float32[128] = input
cos: float32[3, 1, 16] = input
sin: float32[3, 1, 16] = input
pages_k: float32[7, 2, 4, 16] = input
pages_v: float32[7, 2, 4, 16] = input
table: int32[3, 2] = input
length: int32[3] = input
unsqueeze: float32[3, 1, 1, 16] = unsqueeze(cos, 1)
unsqueeze_1: float32[3, 1, 1, 16] = unsqueeze(sin, 1)
unflatten: float32[3, 1, 8, 16] = unflatten(p, 2, (8, 16))
getitem_7: float32[3, 4, 16] = getitem(unflatten, (slice(None, None, None), 0, slice(0, 4, None)))
getitem_8: float32[3, 2, 16] = getitem(unflatten, (slice(None, None, None), 0, slice(4, 6, None)))
getitem_9: float32[3, 2, 16] = getitem(unflatten, (slice(None, None, None), 0, slice(6, 8, None)))
unflatten_1: float32[8, 16] = unflatten(bias, 0, (8, 16))
getitem_10: float32[3, 16] = getitem(unsqueeze, (slice(None, None, None), 0, 0))
getitem_11: float32[3, 16] = getitem(unsqueeze_1, (slice(None, None, None), 0, 0))
paged_decode_default: float32[3, 4, 16] = qerl.paged_decode(getitem_7, getitem_8, getitem_9, pages_k, pages_v, table, length, 0.25, 0, getitem_10, getitem_11, unflatten_1)
return (paged_decode_default,)""",
    )


def test_without_a_bias_only_the_embedding_moves():
    assert_expected_inline(
        decode(bias=False).rewrite(Rotary()),
        """\
p: float32[3, 1, 128] = input
cos: float32[3, 1, 16] = input
sin: float32[3, 1, 16] = input
pages_k: float32[7, 2, 4, 16] = input
pages_v: float32[7, 2, 4, 16] = input
table: int32[3, 2] = input
length: int32[3] = input
split = split(p, [64, 32, 32], -1)
getitem: float32[3, 1, 64] = getitem(split, 0)
getitem_1: float32[3, 1, 32] = getitem(split, 1)
getitem_2: float32[3, 1, 32] = getitem(split, 2)
reshape: float32[3, 1, 4, 16] = reshape(getitem, (3, 1, -1, 16))
reshape_1: float32[3, 1, 2, 16] = reshape(getitem_1, (3, 1, -1, 16))
reshape_2: float32[3, 1, 2, 16] = reshape(getitem_2, (3, 1, -1, 16))
transpose: float32[3, 4, 1, 16] = transpose(reshape, 1, 2)
transpose_1: float32[3, 2, 1, 16] = transpose(reshape_1, 1, 2)
transpose_2: float32[3, 2, 1, 16] = transpose(reshape_2, 1, 2)
unsqueeze: float32[3, 1, 1, 16] = unsqueeze(cos, 1)
unsqueeze_1: float32[3, 1, 1, 16] = unsqueeze(sin, 1)
squeeze_2: float32[3, 2, 16] = squeeze(transpose_2, 2)
squeeze_3: float32[3, 4, 16] = squeeze(transpose, 2)
squeeze_4: float32[3, 2, 16] = squeeze(transpose_1, 2)
getitem_7: float32[3, 16] = getitem(unsqueeze, (slice(None, None, None), 0, 0))
getitem_8: float32[3, 16] = getitem(unsqueeze_1, (slice(None, None, None), 0, 0))
paged_decode_default: float32[3, 4, 16] = qerl.paged_decode(squeeze_3, squeeze_4, squeeze_2, pages_k, pages_v, table, length, 0.25, 0, getitem_7, getitem_8)
return (paged_decode_default,)""",
    )


def swapped(toy, x, cos, sin):
    """The same sums and products with their operands the other way round."""
    turned = toy.call(operator.mul, sin, half_turn(toy, x))
    return toy.call(torch.add, turned, toy.call(torch.mul, cos, x))


def told(options):
    """What a case is called: not by the address of a function, which differs between xdist's processes."""
    return " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "plain"


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tables": (1, 1, D)}, {"rotate": swapped}], ids=told)
def test_the_rewritten_program_computes_the_same_and_writes_the_same_pages(options):
    toy = decode(**options)
    want = results(toy)
    toy.rewrite(Rotary())
    (call,) = calls(toy)
    assert len(call.args) == (11 if options.get("bias") is False else 12)
    for got, one in zip(results(toy), want, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=1e-6)
    assert not results(toy)[0][1].any()  # the idle row


def plain(toy, x, cos, sin):
    return x


def partial(toy, x, cos, sin):
    first, rest = (toy.call(operator.getitem, x, (..., part)) for part in (slice(None, 8), slice(8, None)))
    tables = (toy.call(operator.getitem, table, (..., slice(None, 8))) for table in (cos, sin))
    turned = embedded(toy, first, *tables, turn=lambda toy, x: half_turn(toy, x, 4))
    return toy.call(torch.cat, [turned, rest], -1)


def with_turn(turn):
    return lambda toy, x, cos, sin: embedded(toy, x, cos, sin, turn)


def other_sign(toy, x):
    return toy.call(operator.neg, half_turn(toy, x))


def interleaved(toy, x):
    odd, even = (toy.call(operator.getitem, x, (..., slice(begin, None, 2))) for begin in (1, 0))
    return toy.call(torch.cat, [toy.call(operator.neg, odd), even], -1)


def unswapped(toy, x):
    low, high = (toy.call(operator.getitem, x, (..., part)) for part in (slice(None, 8), slice(8, None)))
    return toy.call(torch.cat, [toy.call(operator.neg, low), high], -1)


def of_another(toy, x):
    return half_turn(toy, toy.call(operator.mul, x, 2))


def subtracted(toy, x, cos, sin):
    return toy.call(operator.sub, toy.call(operator.mul, x, cos), toy.call(operator.mul, half_turn(toy, x), sin))


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": plain},
        {"rotate_k": plain},
        {"rotate": plain, "rotate_k": embedded},
        {"rotate_k": lambda toy, x, cos, sin: embedded(toy, x, sin, cos)},
        {"rotate": partial},
        {"rotate": with_turn(other_sign)},
        {"rotate": with_turn(interleaved)},
        {"rotate": with_turn(unswapped)},
        {"rotate": with_turn(of_another)},
        {"rotate": with_turn(lambda toy, x: half_turn(toy, x, 4))},
        {"rotate": subtracted},
        {"tables": (B, 1, 1)},
        {"projected": torch.bfloat16, "bias": False},  # tables in float32 make q and k float32
    ],
    ids=[
        "no embedding", "q alone", "k alone", "other tables for k", "a part of the head", "other sign", "interleaved",
        "halves in place", "the half turn of something else", "another half", "a difference", "a table per row alone",
        "wider tables",
    ],
)  # fmt: skip
def test_other_embeddings_stay_where_they_are(options):
    toy = decode(**options)
    if options.get("projected"):
        assert calls(toy)[0].meta["example_value"].dtype == torch.float32
    assert toy.unchanged_by(Rotary())


def test_biases_of_parts_in_another_order_stay_in_the_graph():
    """k and v read each other's part: the bias of the operator would go to the wrong heads."""
    toy = decode(order=(0, 2, 1))
    want = results(toy)
    toy.rewrite(Rotary())
    (call,) = calls(toy)
    assert len(call.args) == 11
    for got, one in zip(results(toy), want, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=1e-6)


@torch.no_grad()
def logits(family, *, rotary):
    """Of a few decode steps in fp32, with and without the pass; how many graphs had attention with tables."""
    window: dict[str, Any] = {"sliding_window": 4} if family == "gemma3" else {}
    model = tiny_model(family, layers=2, **window)
    model = transform(model, Recipe.named("qerl-nvfp4-aqn"), inner="eager")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    kind, found, seen = model.model.layers[0]._compiled_call_impl.graphs, [], []
    _ = kind.rollout

    def watch(program):
        found.extend(len(n.args) for n in program.graph.nodes if n.target in (DECODE, DECODE.default))

    for compiler in model.qerl.compilers:
        compiler.passes = [*(one for one in compiler.passes if rotary or not isinstance(one, Rotary)), watch]
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits[:, -1]))
    sampler = PagedSampler(model, rows=2, page_tokens=4)
    sampler.generate([(5, 9, 17, 33), (7, 8)], 1, Sampling(6, (), 0, 0.0))
    return torch.cat(seen), set(found)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_whole_models_give_the_same_logits_with_and_without_the_pass(family):
    want, outside = logits(family, rotary=False)
    got, inside = logits(family, rotary=True)
    assert (outside, inside) == ({9}, {12 if family == "qwen2" else 11})
    assert len(want) > 6
    assert (got - want).abs().max() <= 1e-5
