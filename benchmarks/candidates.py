"""What benchmarks/tune.py tries: small functions, one per kernel, each yielding configurations for a cell.

To try a new kernel, write a function of (n, k, m, multiprocessors) that yields choices as dispatch.py lists them, and
put it into `FUNCTIONS`; kernels that cuda.py does not launch are left out by tune.py. Yield freely: equal choices
are tried once, and whatever is 1.25 times slower than the best after two replays is dropped. What costs is compiling,
5 s a form on one of 16 cores: `slices`, `waves` and `share` are arguments of a compiled kernel and cost nothing, every
other key makes a new form.

Legend: M tokens, N output features, K input features.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qerl_compile.kernels import dispatch

Choice = dict[str, Any]
Candidates = Callable[[int, int, int, int], Iterator[Choice]]

RUNTIME_KEYS = ("slices", "waves", "share", "groups")  # of a choice, that do not make another compiled kernel
SMALL = 1 << 25  # weights; a smaller layer has too few tiles to fill the card with the usual ones


def two_step(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if m >= 32:
        yield dispatch.TWO_STEP


def decode(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if m > 64:
        return
    for tokens, config in dispatch._DECODE.items():
        if m <= tokens <= 2 * m or tokens == 8 >= m:
            for per_sm in (1, 3, 5):
                slices = dispatch.slices_for(n, k, m, config, multiprocessors, per_sm)
                yield {"kernel": "decode", **config, "slices": slices}
    if m <= 8:
        wide = {"BM": 8, "BN": 64, "BK": 256, "SWAP": 1, "num_warps": 2, "num_stages": 4}
        for per_sm in (2, 4):
            slices = dispatch.slices_for(n, k, m, wide, multiprocessors, per_sm)
            yield {"kernel": "decode", **wide, "slices": slices}


def hopper(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if k % 256 or m > 2048:
        return
    for tokens, config in dispatch._HOPPER.items():
        fits = tokens >= m and (tokens <= 2 * m or tokens == 8)
        fits = fits or (n * k < SMALL and 32 <= tokens < m <= 4 * tokens)  # more, smaller tiles
        if fits or (m > 64 and tokens == 128) or (m > 128 and tokens == 256):
            for form in hopper_forms(tokens, config):
                yield {"kernel": "hopper", **form}
                if m > tokens >= 128:
                    for groups in (2, 4):
                        yield {"kernel": "hopper", **form, "groups": groups}


def hopper_forms(tokens: int, config: Choice) -> Iterator[Choice]:
    """Tiles of one number of tokens: sharing all or the rest, dependent launches, other pipelines."""
    for dependent in (1, 3) if tokens <= 32 else (0, 3):
        for waves in (-1, 0):
            yield {**config, "waves": waves, "dependent": dependent}
    if tokens <= 16:
        yield {**config, "consumers": 2, "registers": 104, "per_sm": 2}
    if tokens in (64, 128):  # two accumulators a consumer: fewer bytes of x per product, more sums to share
        yield {**config, "rows": 128, "slots_w": 3, "slots_x": 4 if tokens == 64 else 3, "waves": 0, "dependent": 3}
    if tokens == 256:
        yield {**config, "slots_w": 3, "waves": 0}


def stream(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if k % 256 or m > 32:
        return
    tokens = 8 if m <= 8 else 16 if m <= 16 else 32
    common = {"kernel": "stream", "T": tokens, "dependent": 1}
    for rows, warps, registers in ((16, 2, 96), (16, 4, 96), (16, 4, 0), (16, 8, 80), (32, 2, 0)):
        tiles = math.ceil(n / rows)
        for slices in {1, *(s for s in (2, 4, 8) if tiles * s <= 8 * multiprocessors and warps * s <= k // 256)}:
            for natural in (0, 1) if tokens == 8 and slices == 1 else (0,):
                form = {"R": rows, "W": warps, "SLICES": slices, "NATURAL": natural, "max_registers": registers}
                yield {**common, **form}


def adapted(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    """What takes x from lead_in.py; its launch triggers at the start, so the product is a dependent."""
    for choice in (*stream(n, k, m, multiprocessors), *hopper(n, k, m, multiprocessors)):
        if choice["dependent"] == 1 and not choice.get("NATURAL") and choice.get("tokens", 0) <= max(8, m):
            yield choice
            if choice.get("consumers") == 2:
                yield {**choice, "waves": 0}


def two_step_dx(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    yield dispatch.TWO_STEP


def plain_dx(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if m > 256:
        return
    small = {"BM": 16 if m <= 16 else 64, "BK": 128, "BN": 64, "num_warps": 4, "num_stages": 4}
    large = {"BM": 128, "BK": 128, "BN": 64, "num_warps": 8, "num_stages": 4}
    for config in (small, large) if m > 64 else (small,):
        tiles = math.ceil(m / config["BM"]) * math.ceil(k / config["BK"])
        for per_sm in (1, 3):
            slices = max(1, min(round(per_sm * multiprocessors / tiles), n // (2 * config["BN"]), 32))
            yield {"kernel": "dx", **config, "slices": slices}


def hopper_dx(n: int, k: int, m: int, multiprocessors: int) -> Iterator[Choice]:
    if k % 256 or n % 8 or m > 2048:
        return
    wide = {"registers": 232, "max_registers": 0, "per_sm": 1, "groups": 4}
    forms = (
        {"tokens": 16, "steps": 1, "slots": 8, "registers": 104, "max_registers": 80, "per_sm": 2, "groups": 4},
        {"tokens": 32, "steps": 2, "slots": 7, **wide},
        {"tokens": 64, "steps": 2, "slots": 5, **wide},
        {"tokens": 128, "steps": 1, "slots": 8, **wide},
        {"tokens": 128, "steps": 2, "slots": 4, **wide},
    )
    for form in forms:
        tokens = form["tokens"]
        fits = m <= tokens <= max(32, 2 * m) or m > tokens == 128 or (n * k < SMALL and 16 < tokens < m <= 4 * tokens)
        if not fits:
            continue
        even = max(1, form["per_sm"] * multiprocessors // (math.ceil(m / tokens) * (k // 256)))
        for waves, share in (
            (-1, even),
            (-1, 1000),
            (0, 1000),
        ):  # a tile is shared by as many CTAs as there are, or more
            yield {"kernel": "hopper_dx", **form, "waves": waves, "share": share}


FUNCTIONS: dict[str, tuple[Candidates, ...]] = {
    "forward": (two_step, decode, stream, hopper),
    "adapted": (adapted,),
    "dx": (two_step_dx, plain_dx, hopper_dx),
}


def name(choice: Choice) -> str:
    """Equal for equal choices, whatever the order of their keys."""
    return json.dumps(choice, sort_keys=True)


def form(choice: Choice) -> str:
    """Equal for choices that one compiled kernel serves, as far as the choice decides."""
    constants = {key: value for key, value in choice.items() if key not in RUNTIME_KEYS}
    return name({**constants, "split": choice.get("slices", 1) > 1})


def distinct(choices: Iterable[Choice]) -> list[Choice]:
    """In order, without repetitions."""
    return list({name(choice): choice for choice in choices}.values())


def of(direction: str, n: int, k: int, m: int, multiprocessors: int, incumbent: Choice | None = None) -> list[Choice]:
    """All candidates of a cell; the incumbent, the choice of the present table, is one of them."""
    found = [choice for function in FUNCTIONS[direction] for choice in function(n, k, m, multiprocessors)]
    return distinct([incumbent, *found] if incumbent else found)
