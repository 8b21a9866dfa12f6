"""Which kernel for which shape: a checked-in table, and a rule for the shapes that are not in it.

benchmarks/tune.py measures every candidate on a device and writes `tables/sm_XY.json`; this module only looks up.
Nothing is ever timed or tuned inside a training step, so the choice (and with it the order of every sum) is the same
on every run and every rank.

A table maps a direction ("forward", "adapted" or "dx"), a weight "NxK" and a bucket of tokens to a choice. A bucket is
named by its largest number of tokens, and 5 tokens use the next one that the weight has, "8". "adapted" is forward with
an adapter's first product in the launch before (lead_in.py), between kernels that wait for each other as in a decode
step; where the table does not have it, forward's choice holds. Choices are

    {"kernel": "stream",   R, W, T, SLICES, NATURAL, ...}                        nvfp4_stream.py
    {"kernel": "decode",   BM, BN, BK, SWAP, slices, num_warps, num_stages}      nvfp4_decode.py
    {"kernel": "hopper",   tokens, rows, consumers, slots_w, ..., waves}         nvfp4_hopper.py
    {"kernel": "hopper_dx", tokens, steps, slots, ..., waves, share}             nvfp4_hopper_dx.py
    {"kernel": "dx",       BM, BK, BN, slices, num_warps, num_stages}            nvfp4_dx.py
    {"kernel": "two_step"}                                                       nvfp4_two_step.py

Importing this costs nothing: Triton stays out until a kernel runs.
"""

import json
from functools import cache, lru_cache
from importlib import resources
from typing import Any

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TWO_STEP: dict[str, Any] = {"kernel": "two_step"}

# What tuning found on most large layers, for shapes that are not in a table.
_DECODE = {
    8: {"BM": 8, "BN": 32, "BK": 256, "SWAP": 1, "num_warps": 2, "num_stages": 4},
    16: {"BM": 16, "BN": 64, "BK": 256, "SWAP": 0, "num_warps": 4, "num_stages": 4},
    32: {"BM": 32, "BN": 64, "BK": 128, "SWAP": 0, "num_warps": 4, "num_stages": 4},
    64: {"BM": 64, "BN": 64, "BK": 128, "SWAP": 0, "num_warps": 4, "num_stages": 4},
}
_NARROW = {"rows": 64, "consumers": 1, "slots_w": 4, "slots_x": 4, "registers": 0, "max_registers": 80, "dependent": 1}
_WIDE = {"rows": 64, "consumers": 2, "slots_w": 4, "slots_x": 3, "registers": 240, "max_registers": 0, "dependent": 3}
_HOPPER = {
    8: {**_NARROW, "tokens": 8, "per_sm": 3, "waves": -1},
    16: {**_NARROW, "tokens": 16, "per_sm": 3, "waves": -1},
    32: {**_NARROW, "tokens": 32, "per_sm": 2, "waves": -1},
    64: {**_WIDE, "tokens": 64, "per_sm": 1, "waves": 0},
    128: {**_WIDE, "tokens": 128, "slots_x": 4, "per_sm": 1, "waves": 0},
    256: {**_WIDE, "tokens": 256, "slots_x": 5, "per_sm": 1, "waves": 0, "groups": 4},
}
_HOPPER_DX = {
    32: {"tokens": 32, "steps": 2, "slots": 7},
    64: {"tokens": 64, "steps": 2, "slots": 5},
    2048: {"tokens": 128, "steps": 2, "slots": 4},
}
_STREAM = {"R": 16, "W": 4, "dependent": 1, "max_registers": 96}
LARGE = 1 << 26  # weights, from where keeping more bytes in flight beats starting sooner
MEDIUM = 1 << 25  # below, two-step wins from 512 tokens on
_DX_SMALL = {"kernel": "dx", "BM": 64, "BK": 128, "BN": 64, "num_warps": 4, "num_stages": 4}


@lru_cache(maxsize=4096)
def choose(direction: str, n: int, k: int, m: int, capability: tuple[int, int], multiprocessors: int) -> dict[str, Any]:
    """The kernel and its configuration.

    Args:
        direction: "forward" (x -> y), "adapted" (likewise, with an adapter) or "dx" (dy -> dx).
        n: output features of the weight.
        k: input features.
        m: tokens, at least 1.
        capability: compute capability of the device.
        multiprocessors: of the device.

    Returns:
        One of the choices listed at the top; shared between calls, not to be changed.
    """
    entry = _table(capability).get(direction, {}).get(f"{n}x{k}", {})
    bucket = next((name for name in entry if m <= int(name)), None)  # in ascending order
    if bucket is not None:
        return entry[bucket]
    if direction == "adapted":
        return choose("forward", n, k, m, capability, multiprocessors)
    return _rule(direction, n, k, m, capability, multiprocessors)


def _rule(direction: str, n: int, k: int, m: int, capability: tuple[int, int], multiprocessors: int) -> dict[str, Any]:
    ours = capability[0] == 9 and k % 256 == 0
    if direction == "dx":
        if ours and n % 8 == 0 and n * k >= 1 << 22 and m <= max(_HOPPER_DX):
            return _hopper_dx(k, m, multiprocessors)
        return portable_dx(n, k, m, multiprocessors)
    if not ours or n * k < 1 << 19:
        return portable(n, k, m, multiprocessors)
    if m <= 16 and n * k < LARGE:
        return _stream(n, k, m, multiprocessors)
    if m <= 256 or (m <= 1024 and n * k >= MEDIUM):
        return {"kernel": "hopper", **_HOPPER[next(b for b in _HOPPER if m <= b or b == max(_HOPPER))]}
    return TWO_STEP


def _stream(n: int, k: int, m: int, multiprocessors: int) -> dict[str, Any]:
    """As many slices of K as leave no multiprocessor with more than the five CTAs that it holds."""
    slices = 1
    while -(-n // 16) * 2 * slices <= 5 * multiprocessors and k // 256 >= 8 * slices:
        slices *= 2
    natural = int(m == 1 and slices == 1)
    return {"kernel": "stream", **_STREAM, "T": 8 if m <= 8 else 16, "SLICES": slices, "NATURAL": natural}


def _hopper_dx(k: int, m: int, multiprocessors: int) -> dict[str, Any]:
    """Up to 256 tokens every tile gets the same number of CTAs; with more, the steps are dealt out evenly."""
    form = _HOPPER_DX[next(b for b in _HOPPER_DX if m <= b)]
    even = max(1, multiprocessors // (-(-m // form["tokens"]) * (k // 256)))
    common = {"registers": 232, "max_registers": 0, "per_sm": 1, "groups": 4, "waves": -1}
    return {"kernel": "hopper_dx", **form, **common, "share": even if m <= 256 else 1000}


def portable(n: int, k: int, m: int, multiprocessors: int) -> dict[str, Any]:
    """The forward choice that every architecture, shape and alignment can run."""
    bucket = next((b for b in _DECODE if m <= b), None)
    if bucket is None:
        return TWO_STEP
    return {"kernel": "decode", **_DECODE[bucket], "slices": slices_for(n, k, m, _DECODE[bucket], multiprocessors)}


def portable_dx(n: int, k: int, m: int, multiprocessors: int) -> dict[str, Any]:
    """The same for dx."""
    if m > 128:
        return TWO_STEP
    tiles = -(-m // 64) * -(-k // 128)
    return {**_DX_SMALL, "slices": max(1, min(2 * multiprocessors // tiles, n // 256, 32))}


def slices_for(n: int, k: int, m: int, config: dict[str, int], multiprocessors: int, per_sm: int = 3) -> int:
    """Slices of K that put about `per_sm` CTAs on each multiprocessor, each with at least two k tiles."""
    tiles = -(-n // config["BN"]) * -(-m // config["BM"])
    k_tiles = -(-k // config["BK"])
    return max(1, min(round(multiprocessors * per_sm / tiles), k_tiles // 2, 32))


@cache
def _table(capability: tuple[int, int]) -> dict[str, Any]:
    name = f"sm_{capability[0]}{capability[1]}.json"
    file = resources.files("qerl_compile.kernels") / "tables" / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
