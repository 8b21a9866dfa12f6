"""Launching the warp-specialized Hopper kernel: tile shapes, grid, descriptors, LoRA, dependent launch.

`linear` permutes x, then runs nvfp4_wgmma.kernel over a persistent grid. What follows from shapes and configuration
alone is worked out once (`_plan`); a call is two prepared launches (prepared_launch.py) and one allocation.

A config names the tile and the pipeline:
    tokens       columns of a tile, 8 to 256
    rows         weight rows of a consumer, 64 or 128 (two accumulators);  consumers  1 or 2
    slots_w      weight tiles in flight;  slots_x  groups of x planes in flight (a group is what one copy fetches:
                 4 planes of 64 columns up to 64 tokens, 2 at 128, 1 at 256)
    registers    of the second consumer's threads;  max_registers  of the kernel, 0 for the most;  per_sm  CTAs per SM
    waves        whole tiles per CTA before the rest is shared: -1 as many as fit, 0 share everything
    groups       of CTAs, each with its own tiles of tokens, that walk over the weights side by side, so that DRAM is
                 read once and not once a tile of tokens; at most so many (`side_by_side`); 1
    dependent    programmatic dependent launch of: 0 nothing, 1 and 3 both kernels, 2 the main kernel only

Programmatic dependent launch. A kernel so launched may start when every CTA of the one before has exited or executed
`launch_dependents`; that one's writes it may read only after `griddepcontrol.wait`, which waits for its end.
    1: the permutation triggers and waits at its start, the main kernel waits before x and then triggers. Then
       the next call's two kernels may sit on the device while this one still computes: good with few tokens (-0.5 to
       -1.5 µs), bad with large tiles (+3 to +5), where they take room from CTAs that work.
    2: the permutation is an ordinary launch that triggers at its start; the main kernel does not trigger. So only the
       main kernel's start (barriers, warp specialization, the first weights) overlaps the permutation.
    3: as 1, but the main kernel triggers when its producer has asked for its last tile: the next call's launches
       overlap its end and take no room before it.
What may be read when. Weights and block scales are read before the wait, all else (x, partial sums, counters,
decode_scale, h, B, and every write) after x has arrived in shared memory, hence after the wait of that CTA's producer.
    2: the permutation started after all earlier kernels had ended and been flushed, and the main kernel starts after
       the permutation did: whatever those wrote, weights included, is there. Only x needs the wait.
    1, 3: the main kernel may start before the permutation has waited for *its* predecessor. After the wait all is there
       as well, for the permutation itself ended after waiting. Before it, nothing that the kernel directly before the
       permutation wrote: a weight written by that very kernel must not come with them. (Weights are constants here.
       After `quantize` comes the reciprocal that makes decode_scale, and that is an ordinary launch.)
Where an adapter comes with few tokens, lead_in.py is in the place of the permutation, and in a captured graph the main
kernel goes on when x has been counted (lead_in.py): x, counters and partial sums come after the count, everything in
the epilogue (h, B, decode_scale, the residual, y) after a wait of the consumer. A CTA that only helps with a tile never
waits; every tile has an owner that does, so the kernel still does not end before the one before it has.
Buffers are not overwritten too early either: in both, the permutation writes only when the previous call's main kernel
has ended, in 1 and 3 because it waits first.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from qerl_compile.kernels import lead_in, nvfp4_wgmma
from qerl_compile.kernels.nvfp4_permute import permute, permuted_rows
from qerl_compile.kernels.nvfp4_persistent import side_by_side, whole_and_shared
from qerl_compile.kernels.nvfp4_wgmma_layouts import CODES_SMEM, TILE_K, X_SMEM
from qerl_compile.kernels.nvfp4_workspace import partial_sums, permuted, turn
from qerl_compile.kernels.prepared_launch import Box, BoxKind, prepare

__all__ = ["linear", "room_for_lora"]

MOST_SUMS = 128 * 128  # of a consumer


def room_for_lora(config: dict[str, Any]) -> bool:
    """Whether h · Bᵀ can be added in the epilogue.

    Where the sums take 128 registers (256 tokens, or two accumulators of 128) it would spill, on Triton 3.9 by
    hundreds, and what it saves over a second pass over y was 1 % (5120x5120 and 18944x3584 at 256 tokens).
    """
    return config["rows"] * config["tokens"] != MOST_SUMS


class _Plan(NamedTuple):
    """What a call needs and its tensors' contents and addresses do not change."""

    launch: Any
    grid: tuple[int]
    x: BoxKind
    w: BoxKind
    rows_x: int  # of the permuted activations
    partial: int  # words of partial sums, after which the counters lie
    counters: int
    integers: tuple[int, ...]


@cache
def _box(rows: int, columns: int, layout: object) -> BoxKind:
    """One object per kind: plans of different M share their descriptors."""
    return BoxKind((rows, columns), layout)


@lru_cache(maxsize=4096)
def _plan(
    m: int, n: int, k: int, rank: int, residual: bool, multiprocessors: int, items: tuple[tuple[str, Any], ...]
) -> _Plan:
    config = dict(items)
    tokens, rows, consumers = config["tokens"], config["rows"], config["consumers"]
    group = min(4, 256 // tokens)
    k_tiles = k // TILE_K
    m_tiles = -(-m // tokens)
    groups = side_by_side(m_tiles, config.get("groups", 1))
    m_tiles //= groups
    tiles = m_tiles * -(-n // (rows * consumers))  # of a group
    workers = max(1, min(multiprocessors * config["per_sm"] // groups, tiles * k_tiles))
    waves, shared = whole_and_shared(tiles, k_tiles, workers, config["waves"])
    options: dict[str, int] = {"num_warps": 4}
    if config["dependent"]:
        options["launch_pdl"] = True
    if config["max_registers"]:
        options["maxnreg"] = config["max_registers"]
    launch = prepare(
        nvfp4_wgmma.kernel, TOKENS=tokens, ROWS=rows, CONSUMERS=consumers, SLOTS_W=config["slots_w"],
        SLOTS_X=config["slots_x"], GROUP=group, CONSUMER_REGISTERS=config["registers"],
        DEPENDENT=config["dependent"], RANK=rank, RESIDUAL=residual, **options,
    )  # fmt: skip
    return _Plan(
        launch=launch,
        grid=(workers * groups,),
        x=_box(group * tokens, 64, X_SMEM),
        w=_box(rows, 128, CODES_SMEM),
        rows_x=permuted_rows(m, k, tokens),
        partial=workers * groups * consumers * rows * tokens if shared else 0,
        counters=shared * groups * consumers,
        integers=(m, n, k_tiles, m_tiles, groups, waves, shared * k_tiles, n),
    )


def linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, Any],
    multiprocessors: int,
    h_MR: Tensor | None = None,
    lora_B_NR: Tensor | None = None,
    lora_A_RK: Tensor | None = None,
    residual_MN: Tensor | None = None,
) -> Tensor:
    """y = (x · Pᵀ) · decode_scale [+ h · Bᵀ] [+ residual].

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 4-byte aligned.
        codes_NK2: uint8 [N, K/2], contiguous, 16-byte aligned, standard layout.
        block_NG: float8_e4m3fn [N, K/16], contiguous.
        decode_scale: float32, one element.
        config: see above.
        multiprocessors: of the device.
        h_MR: bfloat16 [M, R], R 16, 32, 64 or 128, rows contiguous, alpha / rank included; `room_for_lora` says yes.
        lora_B_NR: bfloat16 [N, R], rows contiguous.
        lora_A_RK: bfloat16 [R, K], in place of h, which lead_in.py then makes while it reorders x; its `supports` must
            say yes.
        residual_MN: bfloat16 [M, N], rows contiguous: added to y after y is rounded, and rounded again.

    Returns:
        bfloat16 [M, N].
    """
    m, k = x_MK.shape
    n = codes_NK2.shape[0]
    rank = 0 if lora_B_NR is None else lora_B_NR.shape[1]
    plan = _plan(m, n, k, rank, residual_MN is not None, multiprocessors, tuple(config.items()))
    device = x_MK.device
    y_MN = x_MK.new_empty(m, n)
    tokens, dependent, used = config["tokens"], config["dependent"], plan.partial + plan.counters
    arrival: list[Any] = [None, 0, 0]
    with turn(device):
        x = permuted(device, plan.rows_x)
        if lora_A_RK is None:
            part = partial_sums(device, used)
            permute(x_MK, tokens, dependent=dependent, out=x, clear=(part, plan.partial, plan.counters))
        else:
            offset = lead_in.behind(used)
            part = partial_sums(device, offset + lead_in.sums(m, rank, k))
            order = lead_in.Order(False, tokens, x, plan.partial, plan.counters)
            waits, triggers = dependent in (1, 3), dependent > 0
            lead = lead_in.launch(x_MK, lora_A_RK, order, part, offset, waits=waits, triggers=triggers)
            h_MR, *arrival = lead
        strides = (1, 1) if h_MR is None or lora_B_NR is None else (h_MR.stride(0), lora_B_NR.stride(0))
        stride_residual = 1 if residual_MN is None else residual_MN.stride(0)
        plan.launch(
            plan.grid, Box(x, plan.x), Box(codes_NK2, plan.w), block_NG, decode_scale, y_MN, part, h_MR, lora_B_NR,
            residual_MN, *arrival, *plan.integers, *strides, stride_residual,
        )  # fmt: skip
    return y_MN
