"""Candidates, pruning, winners and merging: the part of the tuner that needs no GPU."""

from benchmarks import candidates, tune
from qerl_compile.kernels import dispatch

A = {"kernel": "decode", "BM": 8, "slices": 3}
B = {"kernel": "hopper", "tokens": 8, "waves": 0}


def test_what_is_far_from_the_best_is_dropped():
    times = {"a": [10.0, 9.0, 11.0], "b": [11.0, 11.0, 11.1], "c": [12.0, 11.3, 15.0]}
    assert tune.survivors(times) == ["a", "b"]


def test_the_present_choice_stays_unless_another_is_clearly_faster():
    times = {candidates.name(A): [10.05, 10, 10.1], candidates.name(B): [10.0, 9.9, 10.1]}
    assert tune.winner(times, A) == candidates.name(A)
    assert tune.winner(times, None) == candidates.name(B)
    times[candidates.name(B)] = [9.8, 9.7, 9.9]
    assert tune.winner(times, A) == candidates.name(B)
    assert tune.winner({candidates.name(B): [9.8, 9.7, 9.9]}, A) == candidates.name(B)


def test_merging_replaces_tuned_cells_and_keeps_the_others():
    base = {"forward": {"48x96": {"1": A, "64": A}}, "adapted": {}, "dx": {"48x96": {"1": A}}}
    table = tune.merged(base, {"forward": {"48x96": {"8": B, "1": B}, "2x32": {"1": B}}, "dx": {}})
    assert list(table["forward"]["48x96"].items()) == [("1", B), ("8", B), ("64", A)]
    assert table["forward"]["2x32"] == {"1": B}
    assert table["dx"] == base["dx"]
    assert base["forward"]["48x96"] == {"1": A, "64": A}


def test_candidates_are_distinct_and_the_incumbent_is_among_them():
    present = {"slices": 99, "kernel": "decode", "BM": 8}
    found = candidates.of("forward", 27648, 5120, 8, 132, present)
    names = [candidates.name(choice) for choice in found]
    assert len(names) == len(set(names))
    assert found[0] == present
    again = candidates.of("forward", 27648, 5120, 8, 132, dict(reversed(found[3].items())))
    assert len(again) == len(found) - 1


def test_kernels_that_the_launcher_does_not_know_are_left_out():
    known = [{"kernel": "hopper"}, dispatch.TWO_STEP, {"kernel": "dx"}]
    assert tune.routed([*known, {"kernel": "no such kernel"}]) == known


def test_choices_that_differ_in_arguments_only_are_one_form():
    assert candidates.form({**B, "waves": -1}) == candidates.form(B)
    assert candidates.form({**A, "slices": 5}) == candidates.form(A)
    assert candidates.form({**A, "slices": 1}) != candidates.form(A)


def test_every_cell_has_a_candidate_and_hopper_only_where_it_can_run():
    for n, k in tune.SHAPES:
        for direction, m in tune.cells_of(n, k):
            kernels = {choice["kernel"] for choice in candidates.of(direction, n, k, m, 132)}
            assert kernels
            assert k % 256 == 0 or not kernels & {"hopper", "stream", "hopper_dx"}


def test_the_whole_tuning_compiles_few_enough_forms():
    """300 forms of 5 s on 16 cores are 94 s of the 240 that a run may take."""
    forms = {
        (direction, candidates.form(choice))
        for n, k in tune.SHAPES
        for direction, m in tune.cells_of(n, k)
        for choice in candidates.of(direction, n, k, m, 132)
    }
    assert len(forms) < 300


def test_summary_names_bucket_kernel_and_time():
    tuned = {"forward": {"48x96": {"1": A, "4096": dispatch.TWO_STEP}}, "dx": {}}
    log = [
        {"direction": "forward", "n": 48, "k": 96, "m": 1, "times": {candidates.name(A): [3.21, 3, 4]}},
        {"direction": "forward", "n": 48, "k": 96, "m": 4096, "times": {}},
    ]
    assert tune.summary_lines("48x96", tuned, log, 12.3) == ["48x96 forward [12 s] 1:decode 3.2, 4096:two_st"]
