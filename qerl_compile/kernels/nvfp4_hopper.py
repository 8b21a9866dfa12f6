"""Launching the warp-specialized Hopper kernel: tile shapes, grid, descriptors, dependent launch.

`linear` permutes x, then runs nvfp4_wgmma.kernel over a persistent grid. Both launches may be *programmatic
dependents*: the kernel then starts while the one before it ends, sets up its barriers and asks for its first weights,
and only then waits for x. That saves about 1 µs at few tokens; with large tiles it costs 3 to 5, because waiting CTAs
take room from the ones that still work, so it is part of the configuration.

A config names the tile and the pipeline:
    tokens       columns of a tile, 8 to 256
    rows         weight rows of a consumer, 64 or 128;  consumers  1 or 2
    slots_w      weight tiles in flight;  slots_x  groups of x planes in flight (a group is what one copy fetches:
                 4 planes of 64 columns up to 64 tokens, 2 at 128, 1 at 256)
    registers    of the second consumer's threads;  max_registers  of the kernel, 0 for the most;  per_sm  CTAs per SM
    waves        whole tiles per CTA before the rest is shared: -1 as many as fit, 0 share everything
    dependent    1 to launch as programmatic dependents
"""

from typing import Any

from torch import Tensor, empty, int32
from torch import bfloat16 as bf16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qerl_compile.kernels import nvfp4_wgmma
from qerl_compile.kernels.nvfp4_permute import permute
from qerl_compile.kernels.nvfp4_wgmma_layouts import CODES_SMEM, TILE_K, X_SMEM
from qerl_compile.kernels.nvfp4_workspace import flags, partial_sums

__all__ = ["linear", "supports"]


def supports(codes_NK2: Tensor, block_NG: Tensor) -> bool:
    """Whether the kernel can take this weight: whole 256-column tiles, and addresses that TMA and word loads accept."""
    whole = codes_NK2.shape[1] * 2 % TILE_K == 0
    return whole and codes_NK2.data_ptr() % 16 == 0 and block_NG.data_ptr() % 4 == 0


def linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, int],
    multiprocessors: int,
) -> Tensor:
    """y = (x · Pᵀ) · decode_scale.

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 4-byte aligned.
        codes_NK2: uint8 [N, K/2], contiguous, 16-byte aligned, standard layout.
        block_NG: float8_e4m3fn [N, K/16], contiguous.
        decode_scale: float32, one element.
        config: see above.
        multiprocessors: of the device.

    Returns:
        bfloat16 [M, N].
    """
    m, k = x_MK.shape
    n = codes_NK2.shape[0]
    tokens, rows, consumers = config["tokens"], config["rows"], config["consumers"]
    group = min(4, 256 // tokens)
    dependent = bool(config["dependent"])
    k_tiles = k // TILE_K
    m_tiles = -(-m // tokens)
    tiles = m_tiles * -(-n // (rows * consumers))
    grid = min(multiprocessors * config["per_sm"], tiles * k_tiles)
    waves = tiles // grid if config["waves"] < 0 else config["waves"]
    y_MN = empty(m, n, dtype=bf16, device=x_MK.device)
    options: dict[str, int] = {"num_warps": 4, **({"launch_pdl": True} if dependent else {})}
    if config["max_registers"]:
        options["maxnreg"] = config["max_registers"]
    launch: Any = nvfp4_wgmma.kernel[(grid,)]  # Triton types a launch by its device code, where an int is a constexpr
    launch(
        TensorDescriptor.from_tensor(permute(x_MK, tokens, dependent=dependent), [group * tokens, 64], X_SMEM),
        TensorDescriptor.from_tensor(codes_NK2, [rows, 128], CODES_SMEM),
        block_NG.view(int32),
        decode_scale,
        y_MN,
        partial_sums(x_MK.device, grid * consumers * rows * tokens),
        flags(x_MK.device, tiles * consumers),
        m, n, k_tiles, m_tiles, waves, (tiles - waves * grid) * k_tiles, y_MN.stride(0),
        TOKENS=tokens, ROWS=rows, CONSUMERS=consumers, SLOTS_W=config["slots_w"], SLOTS_X=config["slots_x"],
        GROUP=group, CONSUMER_REGISTERS=config["registers"], **options,
    )  # fmt: skip
    return y_MN
