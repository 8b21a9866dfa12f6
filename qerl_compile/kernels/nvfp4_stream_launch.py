"""Launching the stream kernel: grid, scratch, dependent launch.

A config names
    R        rows of a CTA, 16 or 32;  W  its warps, each with its own stretch of K
    T        tokens the accumulators hold, 8, 16 or 32: at least M
    SLICES   CTAs that share a row's K
    NATURAL  1: x is read as it lies in memory, no pass over it before (few tokens); 0: in fragments
    dependent  1 to launch as programmatic dependents
    max_registers  0 for the compiler's choice
"""

from typing import Any

from torch import Tensor

from qerl_compile.kernels import lead_in, nvfp4_stream
from qerl_compile.kernels.nvfp4_fragments import fragments, room
from qerl_compile.kernels.nvfp4_workspace import partial_sums, turn
from qerl_compile.kernels.prepared_launch import prepare

__all__ = ["linear", "reads_in_order", "supports"]


def supports(codes_NK2: Tensor, block_NG: Tensor) -> bool:
    """Whether this kernel, and nvfp4_hopper.py's, can take the weight: whole 256-column tiles, aligned addresses."""
    whole = codes_NK2.shape[1] * 2 % nvfp4_stream.TILE_K == 0
    return whole and codes_NK2.data_ptr() % 16 == 0 and block_NG.data_ptr() % 4 == 0


def reads_in_order(config: dict[str, int], k: int) -> bool:
    """Whether a pass over x comes first. It also clears tickets, so x cannot be read as it lies where K is shared."""
    return not config["NATURAL"] or min(config["SLICES"], k // nvfp4_stream.TILE_K) > 1


def linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, int],
    *,
    h_MR: Tensor | None = None,
    lora_B_NR: Tensor | None = None,
    lora_A_RK: Tensor | None = None,
    residual_MN: Tensor | None = None,
) -> Tensor:
    """y = (x · Pᵀ) · decode_scale [+ h · Bᵀ] [+ residual].

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 16-byte aligned, M <= config["T"].
        codes_NK2: uint8 [N, K/2], contiguous, 16-byte aligned, standard layout.
        block_NG: float8_e4m3fn [N, K/16], contiguous.
        decode_scale: float32, one element.
        config: see above.
        h_MR: bfloat16 [M, R], R a power of two of at least 16.
        lora_B_NR: bfloat16 [N, R].
        lora_A_RK: bfloat16 [R, K], in place of h, which lead_in.py then makes while it reorders x; its `supports` and
            `reads_in_order` must both say yes.
        residual_MN: bfloat16 [M, N], rows contiguous: added to y after y is rounded, and rounded again.

    Returns:
        bfloat16 [M, N].

    Raises:
        ValueError: M is larger than the config's T.
    """
    m, k = x_MK.shape
    n = codes_NK2.shape[0]
    rows, warps, tokens = config["R"], config["W"], config["T"]
    if m > tokens:
        raise ValueError(f"the stream kernel's accumulators hold T = {tokens} tokens, got {m}: choose a larger T")
    k_tiles = k // nvfp4_stream.TILE_K
    slices = min(config["SLICES"], k_tiles)
    tiles = -(-n // rows)
    dependent = bool(config["dependent"])
    natural = not reads_in_order(config, k)
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    if config["max_registers"]:
        options["maxnreg"] = config["max_registers"]
    rank = 0 if lora_B_NR is None else lora_B_NR.shape[1]
    launch = prepare(
        nvfp4_stream.kernel, W=warps, R=rows, T=tokens, SLICES=slices, RANK=rank,
        NATURAL=natural, RESIDUAL=residual_MN is not None, DEPENDENT=dependent, num_warps=warps, **options,
    )  # fmt: skip
    y_MN = x_MK.new_empty(m, n)
    part, sums, tickets = None, tiles * slices * rows * tokens, tiles
    if slices == 1:
        sums = tickets = 0
    x = x_MK
    arrival: list[Any] = [None, 0, 0]
    with turn(x_MK.device):
        if lora_A_RK is not None:
            offset = lead_in.behind(sums + tickets)
            part = partial_sums(x_MK.device, offset + lead_in.sums(m, rank, k))
            x = x_MK.new_empty(*room(tokens, k))
            order = lead_in.Order(True, tokens, x, sums, tickets)
            lead = lead_in.launch(x_MK, lora_A_RK, order, part, offset, waits=dependent, triggers=dependent)
            h_MR, *arrival = lead
        elif slices > 1:
            part = partial_sums(x_MK.device, sums + tickets)
            x = fragments(x_MK, tokens, dependent=dependent, clear=(part, sums, tickets))
        elif not natural:
            x = fragments(x_MK, tokens, dependent=dependent)
        launch(
            (tiles, slices), x, codes_NK2, block_NG, decode_scale, y_MN, part if slices > 1 else None, h_MR, lora_B_NR,
            residual_MN, *arrival, m, n, k_tiles, codes_NK2.stride(0), block_NG.stride(0), x_MK.stride(0), n,
            0 if h_MR is None else h_MR.stride(0), 0 if lora_B_NR is None else lora_B_NR.stride(0),
            0 if residual_MN is None else residual_MN.stride(0),
        )  # fmt: skip
    return y_MN
