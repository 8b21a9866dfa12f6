"""Seeds derived from a path of names and numbers, so that nothing random has to be stored.

`derive_seed(run_seed, "train", position)` hashes its arguments. Equal paths give equal seeds on every machine and in
every process; unequal paths give unrelated ones. Sums such as `seed + index` do not: seed 1 at index 7 would be
seed 3 at index 5. A run that is resumed asks for the same path again and gets the same number, with no state.
"""

import hashlib


def derive_seed(*path: int | str, bits: int = 63) -> int:
    """A uniform integer in [0, 2**bits) from a path of integers and strings.

    Args:
        path: what the seed is for, from general to particular, for example `(run_seed, "rollout", step, index)`.
        bits: width of the result, 1 to 63; 63 fits `torch.Generator.manual_seed`, 31 fits every library.
    """
    if not 1 <= bits <= 63:
        raise ValueError(f"bits must be in 1..63, got {bits}")
    text = repr(path)  # the type is part of it: ("1",) and (1,) differ, and so do ("a", "b") and ("ab",)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)
