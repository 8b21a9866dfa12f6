"""Launching the warp-specialized backward kernel of Hopper: tile shape, grid, descriptors.

A call is one prepared launch (prepared_launch.py) of nvfp4_wgmma_dx.kernel over a persistent grid; what follows from
shapes and configuration alone is worked out once (`_plan`).

A config names the tile and the pipeline:
    tokens       rows of dy in a tile, 8 to 128 (a tile is tokens x 256 columns of dx)
    steps        64-row steps of W that travel together in one slot, 1 or 2;  slots  in flight
    registers    of the second consumer's threads;  max_registers  of the kernel, 0 for the most;  per_sm  CTAs per SM
    waves        whole tiles per CTA before the rest is shared: -1 as many as fit, 0 share everything
    groups       of CTAs that share the tiles of tokens among them: the greatest common divisor with their number
    share        the most CTAs among which a tile is shared: its owner reads their partial sums one after the other
"""

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, int16, int32

from qerl_compile.kernels import nvfp4_wgmma_dx
from qerl_compile.kernels.nvfp4_persistent import side_by_side, whole_and_shared
from qerl_compile.kernels.nvfp4_wgmma_dx_layouts import CODES_SMEM, DY_SMEM, RAW_SMEM, TILE_K, TILE_N, UNITS
from qerl_compile.kernels.nvfp4_workspace import flags, partial_sums
from qerl_compile.kernels.prepared_launch import Box, BoxKind, prepare

__all__ = ["linear_dx", "supports"]


def supports(codes_NK2: Tensor, block_NG: Tensor) -> bool:
    """Whether the kernel can take this weight: whole 256-column tiles, dy rows and addresses that TMA accepts."""
    n, k2 = codes_NK2.shape
    whole = k2 * 2 % TILE_K == 0 and n % 8 == 0
    return whole and codes_NK2.data_ptr() % 16 == 0 and block_NG.data_ptr() % 16 == 0


class _Plan(NamedTuple):
    """What a call needs and its tensors' contents and addresses do not change."""

    launch: Any
    grid: tuple[int]
    dy: BoxKind
    codes: BoxKind
    block: BoxKind
    partial: int
    counters: int
    integers: tuple[int, ...]


@lru_cache(maxsize=4096)
def _kinds(tokens: int, rows: int) -> tuple[BoxKind, BoxKind, BoxKind]:
    return BoxKind((tokens, TILE_N), DY_SMEM), BoxKind((rows, 2 * UNITS), CODES_SMEM), BoxKind((rows, 4), RAW_SMEM)


@lru_cache(maxsize=4096)
def _plan(m: int, n: int, k: int, multiprocessors: int, items: tuple[tuple[str, Any], ...]) -> _Plan:
    config = dict(items)
    tokens, rows = config["tokens"], config["steps"] * TILE_N
    n_tiles, m_tiles = -(-n // rows), -(-m // tokens)
    groups = side_by_side(m_tiles, config["groups"])
    m_tiles //= groups
    tiles = m_tiles * (k // TILE_K)  # of a group
    most = min(n_tiles, config["share"])  # CTAs to a tile
    workers = max(1, min(multiprocessors * config["per_sm"] // groups, tiles * most))
    waves, shared = whole_and_shared(tiles, most, workers, config["waves"])
    options: dict[str, int] = {"maxnreg": config["max_registers"]} if config["max_registers"] else {}
    launch = prepare(
        nvfp4_wgmma_dx.kernel, TOKENS=tokens, SLOTS=config["slots"], STEPS=config["steps"],
        CONSUMER_REGISTERS=config["registers"], num_warps=4, **options,
    )  # fmt: skip
    return _Plan(
        launch,
        (workers * groups,),
        *_kinds(tokens, rows),
        partial=workers * groups * tokens * TILE_K if shared else 1,
        counters=max(2 * shared * groups, 1),
        integers=(m, n_tiles, m_tiles, groups, waves, shared * n_tiles, k),
    )


def linear_dx(
    dy_MN: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, Any],
    multiprocessors: int,
) -> Tensor:
    """dx = (dy · P) · decode_scale.

    Args:
        dy_MN: bfloat16 [M, N], rows contiguous, rows and address 16-byte aligned.
        codes_NK2: uint8 [N, K/2], contiguous, standard layout; `supports` accepts it.
        block_NG: float8_e4m3fn [N, K/16], contiguous.
        decode_scale: float32, one element.
        config: see above.
        multiprocessors: of the device.

    Returns:
        bfloat16 [M, K].
    """
    m, n = dy_MN.shape
    k = codes_NK2.shape[1] * 2
    plan = _plan(m, n, k, multiprocessors, tuple(config.items()))
    dx_MK = dy_MN.new_empty(m, k)
    plan.launch(
        plan.grid,
        Box(dy_MN, plan.dy),
        Box(codes_NK2.view(int16), plan.codes),
        Box(block_NG.view(int32), plan.block),
        decode_scale,
        dx_MK,
        partial_sums(dy_MN.device, plan.partial),
        flags(dy_MN.device, plan.counters),
        *plan.integers,
    )
    return dx_MK
