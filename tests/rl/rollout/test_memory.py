"""Pages and bytes by hand; that nothing needs more than the bounds say is in test_schedule.py."""

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl.rollout.cache import CacheShape
from qerl_compile.rl.rollout.memory import Workload, check_fits, plan_pages

GIB = 2**30


def test_a_page_holds_keys_and_values_of_all_layers():
    # Qwen2.5-32B in bf16: 64 layers, 8 heads of 128, 256 KiB a token
    assert CacheShape(64, 8, 128, 16, torch.bfloat16).page_bytes == 16 * 256 * 1024


@pytest.mark.parametrize(
    "length, new_tokens, group_size, full, prefilled, own, least",
    [
        (9, 3, 2, 2, 3, 1, 4),  # |4|4|1 + 3|: the copy of the partial page is the sample's only page
        (9, 4, 2, 2, 3, 2, 5),
        (8, 4, 2, 2, 2, 1, 3),  # no partial page
        (8, 5, 2, 2, 2, 2, 4),
        (3, 1, 2, 0, 1, 1, 2),  # nothing to share
        (3, 1, 1, 0, 1, 1, 1),  # a group of one takes its prompt's partial page over
        (9, 4, 1, 2, 3, 2, 4),
    ],
)
def test_pages_of_a_request_are_counted_as_drawn_in_the_docstring(
    length, new_tokens, group_size, full, prefilled, own, least
):
    work = Workload((length,), group_size, new_tokens, page_tokens=4)
    assert (work.full_pages(0), work.prompt_pages(0), work.own_pages(0)) == (full, prefilled, own)
    assert work.least_pages(0) == least
    assert work.full_pages(0) + work.own_pages(0) == -(-(length + new_tokens) // 4)


@pytest.mark.parametrize(
    "rows, pages",
    [
        (1, 4 + 3),  # prompt 0 runs one sample: 2 full and 2 own; prompt 0 or another waits prefilled
        (2, 4 + 2 + 3),  # 4, 2 and 2 are the dearest: the two prompts, then prompt 0's second sample
        (3, 4 + 2 + 2 + 3),
        (4, 4 + 2 + 2 + 2),  # all run, none waits
        (9, 4 + 2 + 2 + 2),
    ],
)
def test_pages_of_a_workload_are_those_of_its_dearest_rows(rows, pages):
    assert Workload((9, 3), group_size=2, max_new_tokens=5, page_tokens=4).most_pages(rows) == pages


def test_no_prompts_need_no_pages():
    work = Workload((), 2, 5, 4)
    assert work.most_pages(8) == 0
    assert plan_pages(work, rows=8, page_bytes=100, free_bytes=0) == 0


@pytest.mark.parametrize(
    "changes",
    [{"prompt_lengths": (3, 0)}, {"group_size": 0}, {"max_new_tokens": 0}, {"page_tokens": 0}],
)
def test_a_workload_without_tokens_is_a_mistake(changes):
    values = {"prompt_lengths": (3, 4), "group_size": 2, "max_new_tokens": 5, "page_tokens": 4}
    with pytest.raises(ValueError, match="Workload: expected every number to be at least 1, got"):
        Workload(**(values | changes))


@pytest.mark.parametrize(
    "free_bytes, budget_bytes, pages",
    [
        (10_000, None, 10),  # enough: what the workload can use
        (1_000, None, 8),  # 80 % of what is free
        (1_000, 1_000, 10),
        (1_000, 799, 7),
        (700, 700, 7),
        (500, 500, 5),  # prompt 0 and one of its samples: the least
    ],
)
def test_pages_are_what_the_budget_pays_for_and_the_workload_can_use(free_bytes, budget_bytes, pages):
    work = Workload((9, 3), group_size=2, max_new_tokens=5, page_tokens=4)
    got = plan_pages(work, rows=4, page_bytes=100, free_bytes=free_bytes, budget_bytes=budget_bytes)
    assert got == pages


def test_a_budget_beyond_the_free_memory_is_refused():
    work = Workload((9,), 1, 5, 4)
    with pytest.raises(ModelError) as error:
        plan_pages(work, rows=1, page_bytes=GIB, free_bytes=6 * GIB, budget_bytes=8 * GIB)
    assert str(error.value) == (
        "rollout memory: expected a key-value cache within the 6.00 GiB that are free on the device; got a budget of "
        "8.00 GiB. Lower the budget, or leave it out to use 80 % of what is free."
    )


def test_a_budget_that_cannot_hold_the_largest_request_is_refused_with_what_it_needs():
    work = Workload((9, 500, 40), 8, 100, 16)
    with pytest.raises(ModelError) as error:
        plan_pages(work, rows=4, page_bytes=4 * 2**20, free_bytes=GIB, budget_bytes=150 * 2**20)
    assert str(error.value) == (
        "rollout memory: expected a key-value cache of at least 39 pages of 16 tokens (156.00 MiB), since prompt 1 has "
        "500 tokens and its completions may have 100; got 37 pages of 16 tokens (148.00 MiB). Raise the rollout's "
        "memory budget, or lower max_new_tokens or the longest prompt."
    )
    check_fits(work, 39)
    with pytest.raises(ModelError, match=r"at least 39 pages of 16 tokens, since .* got 38 pages of 16 tokens\. Raise"):
        check_fits(work, 38)
