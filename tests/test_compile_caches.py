"""What torch keeps of our graphs between processes: all of them, under keys that tell apart what differs.

benchmarks/compile_time.py prints hits and seconds; here nothing is compiled, only asked.
"""

import pytest
import torch
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from qerl_compile.backend import _operators
from qerl_compile.stacked_adapters import refresh_stacked_adapters
from qerl_compile.transforming import transform
from tests.models import LONG, SOME_FAMILIES, tiny_model
from tests.pages import Pages

TOKENS_BT = torch.arange(3, 14).repeat(2, 1)


@pytest.fixture
def lowered(monkeypatch):
    """(graph module, tag of its cache key) of every graph that reaches the inner compiler, which only interprets."""
    found, real = [], torch._dynamo.lookup_backend

    def lookup(inner):
        if inner != "inductor":
            return real(inner)

        def compiler(module, inputs):
            found.append((module, torch.compiler.config.cache_key_tag))
            return module.forward

        return compiler

    monkeypatch.setattr("qerl_compile.backend.torch._dynamo.lookup_backend", lookup)
    return found


@pytest.mark.parametrize("family", SOME_FAMILIES if LONG else ("gemma3",))  # it has every kind of node
def test_torch_may_cache_every_graph(lowered, family):
    model = transform(tiny_model(family, layers=1, dtype=torch.bfloat16), "qerl-nvfp4-aqn")
    model(input_ids=TOKENS_BT, use_cache=False)
    refresh_stacked_adapters(model)
    for columns in (11, 1):
        model(input_ids=TOKENS_BT[:, :columns], use_cache=False, qerl_cache=Pages(2))
    assert len(lowered) >= 3
    for module, _ in lowered:
        check_cacheable(module)  # raises BypassAOTAutogradCache with the node that is not


def test_graphs_that_recompute_are_cached_apart_from_those_that_do_not(lowered):
    """And a key tag of the user's stays part of the key."""
    with torch.compiler.config.patch(cache_key_tag="mine "):
        for recompute in (False, True):
            model = transform(tiny_model("llama", layers=1), "qerl-nvfp4-aqn")
            if recompute:
                model.gradient_checkpointing_enable()
            model(input_ids=TOKENS_BT, use_cache=False)
        assert torch.compiler.config.cache_key_tag == "mine "
    (plain, plain_tag), (again, again_tag) = lowered
    assert plain.code == again.code  # the text, which is torch's key, cannot tell
    assert plain_tag.startswith("mine ")
    assert again_tag.startswith(f"{plain_tag} recompute ")


def test_sources_of_the_operators_are_part_of_every_key(lowered, monkeypatch, tmp_path):
    """Their gradients are in the graphs that AOTAutograd keeps, and in no graph's text."""
    for source in ("one", "another"):
        (tmp_path / "ops.py").write_text(source)
        monkeypatch.setattr("qerl_compile.backend.kernels.__file__", str(tmp_path / "__init__.py"))
        _operators.cache_clear()
        transform(tiny_model("llama", layers=1), "qerl-nvfp4-aqn")(input_ids=TOKENS_BT, use_cache=False)
    _operators.cache_clear()
    (one, tag), (other, other_tag) = lowered
    assert one.code == other.code
    assert tag != other_tag
