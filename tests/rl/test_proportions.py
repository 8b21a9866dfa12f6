import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.rl.proportions import Z95, Proportion


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_intervals_as_published(correct: int, total: int, low: float, high: float) -> None:
    """The examples of Newcombe, Statistics in Medicine 17 (1998), table I, method 3; the last one is our own."""
    assert Proportion(correct, total).interval == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_each_end_is_where_the_score_test_is_at_its_limit(case: tuple[int, int]) -> None:
    share = Proportion(*case)
    low, high = share.interval
    assert 0 <= low <= share.rate <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            z = abs(share.rate - end) / (end * (1 - end) / share.total) ** 0.5
            assert z == pytest.approx(Z95, rel=1e-6)


def test_a_proportion_reads_as_a_sentence_part() -> None:
    assert str(Proportion(72, 100)) == "72.0 % [62.5, 79.9] (72/100)"
    assert str(Proportion(0, 4)) == "0.0 % [0.0, 49.0] (0/4)"


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="correct"):
        Proportion(correct, total)
