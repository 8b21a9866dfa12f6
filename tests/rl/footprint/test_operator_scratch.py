import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qerl_compile.kernels import grouped, grouped_cuda
from qerl_compile.recipe import Recipe
from qerl_compile.rl.footprint import Predictor, operator_scratch
from qerl_compile.rl.footprint.liveness import Liveness
from qerl_compile.rl.footprint.prediction import OUTSIDE_BYTES
from tests.models import tiny_mixture

STACK = 128, 1536, 2048  # gate and up projections of a layer of Qwen3-30B-A3B
STACK_BYTES = 128 * 1536 * 2048 * 2


def peak(operator, rows, columns, dtype=torch.bfloat16, stack=STACK):
    """The most that lives in a graph of one call, its operands not counted."""
    experts, n, k = stack
    shapes = {
        (rows, columns): dtype,
        (experts,): torch.int32,
        (experts, n, k // 2): torch.uint8,
        (experts, n, k // 16): torch.float8_e4m3fn,
        (experts, 1): torch.float32,
    }
    operands = [torch.empty(shape, dtype=each, device="meta") for shape, each in shapes.items()]
    graph = make_fx(operator, tracing_mode="fake")(*operands).graph
    return Liveness(graph, counted=lambda node: False).peak({})


@pytest.mark.parametrize(
    ("tokens", "measured"),
    [(1, 805406208), (64, 811601920), (512, 855670784), (4096, 1208221696), (16384, 2416967680)],
)
def test_what_a_forward_call_takes_is_what_was_measured_on_an_h100(tokens, measured):
    """benchmarks/results/moe_layer_h100.json, 8 experts a token."""
    found = peak(grouped.grouped_quantized_linear, 8 * tokens, STACK[2])
    assert found == pytest.approx(measured, rel=1e-3)
    assert found >= STACK_BYTES


def test_a_backward_call_decodes_the_stack_too():
    rows = 4096
    dy, dx = (rows * size * 2 for size in STACK[1:])
    assert peak(grouped.grouped_quantized_linear_dx, rows, STACK[1]) == STACK_BYTES + 3 * dy
    wide = 128, 64, 2048  # dx is larger than all that the scales take: beside it there is the scaled dy
    assert peak(grouped.grouped_quantized_linear_dx, rows, 64, stack=wide) == 128 * 64 * 2048 * 2 + rows * 64 * 2 + dx


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1536), (torch.bfloat16, 1540)])
def test_a_loop_over_experts_has_no_such_scratch(dtype, rows):
    result = 64 * rows * dtype.itemsize
    assert peak(grouped.grouped_quantized_linear, 64, 2048, dtype, (128, rows, 2048)) == result


def test_the_operators_are_those_of_the_kernels():
    assert (operator_scratch.FORWARD, operator_scratch.BACKWARD) == (grouped.FORWARD, grouped.BACKWARD)
    assert operator_scratch.decodes_whole is grouped_cuda.decodes_whole  # one rule for both
    assert grouped_cuda.decodes_whole(grouped_cuda.ALIGNED, torch.bfloat16)
    assert not grouped_cuda.decodes_whole(grouped_cuda.ALIGNED + 1, torch.bfloat16)
    assert not grouped_cuda.decodes_whole(grouped_cuda.ALIGNED, torch.float32)


def test_rollout_and_update_of_a_mixture_contain_its_largest_stack():
    """With as many experts that their stack dwarfs the few activations."""
    sets = ("prompts_per_step=1", "group_size=2", "max_new_tokens=8", "eval_size=2", "micro_batch_tokens=32")
    recipe = Recipe.named("qerl-nvfp4-aqn").with_overrides([f"train.{each}" for each in sets])
    model = tiny_mixture(num_hidden_layers=1, num_experts=256)
    model.config.dtype = torch.bfloat16
    predictor = Predictor(model.config, recipe)
    stack = 256 * 64 * 64 * 2
    found = predictor.footprint(prompt_tokens=8)
    less = predictor.footprint(prompt_tokens=8, train=recipe.train.model_copy(update={"recompute": True}))
    for part in (found.rollout["activations"], found.training["backward"], less.training["backward"]):
        assert stack < part < 1.2 * stack
    assert found.held.scratch == 128 * 64 * 2  # q, k and v, in one matrix
    assert found.held.captured == stack
    assert predictor.footprint(found.peak + OUTSIDE_BYTES + stack, prompt_tokens=8).over == 0
    assert predictor.footprint(found.peak + OUTSIDE_BYTES, prompt_tokens=8).over == stack
