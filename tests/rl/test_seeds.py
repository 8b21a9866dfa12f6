import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.rl.seeds import derive_seed

PATHS = st.lists(st.integers(-(2**40), 2**40) | st.text(max_size=5), max_size=4).map(tuple)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0) == 7210762507766007076
    assert derive_seed(42, "train", 7) == 1574034735678038593
    assert derive_seed(42, "train", 7, bits=31) == 1574034735678038593 >> 32


@given(PATHS, PATHS)
def test_only_equal_paths_share_a_seed(a: tuple, b: tuple) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


@given(PATHS, st.integers(1, 63))
def test_a_seed_fits_its_bits(path: tuple, bits: int) -> None:
    assert 0 <= derive_seed(*path, bits=bits) < 2**bits


def test_where_a_name_ends_matters() -> None:
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(1) != derive_seed("1")


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        derive_seed(1, bits=64)
