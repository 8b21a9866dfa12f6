"""Counters for calls of a captured graph, without a GPU: the driver is stood in for."""

import pytest
import torch

from qerl_compile.kernels import nvfp4_workspace as workspace

CUDA = torch.device("cuda", 0)


@pytest.fixture
def capture(monkeypatch):
    """What the driver would say: the number of the capture that each stream is in, and which stream is current."""
    state = {"number": {1: 7, 2: 7}, "stream": 1}
    words = list(torch.zeros(3 * workspace.SPARE_FLAGS, dtype=torch.int32).split(workspace.SPARE_FLAGS))
    monkeypatch.setattr(workspace, "_place", lambda device: None)
    monkeypatch.setattr(workspace, "_here", lambda device: (0, state["stream"]))
    monkeypatch.setattr(workspace, "_capture_number", lambda stream: state["number"].get(stream))
    for name, value in (("_CAPTURES", {}), ("_SPARES", {0: words}), ("_TAKEN", [])):
        monkeypatch.setattr(workspace, name, value)
    return state


def launched():
    call = workspace.arrivals(CUDA)
    call.launched()
    return call


def test_a_call_that_failed_is_not_counted(capture):
    launched()
    failed, again = workspace.arrivals(CUDA), workspace.arrivals(CUDA)
    assert (failed.at, failed.early) == (again.at, again.early) == (0, True)


def test_calls_of_a_capture_use_two_words_in_turn_and_the_first_is_not_gone_by(capture):
    calls = [launched() for _ in range(4)]
    assert [(call.at, call.early) for call in calls] == [(1, False), (0, True), (1, True), (0, True)]
    assert len({call.words.data_ptr() for call in calls}) == 1


def test_each_capture_and_each_stream_begins_anew_with_words_of_its_own(capture):
    first = [launched() for _ in range(2)]
    capture["stream"] = 2
    other_stream = launched()
    capture["stream"], capture["number"][1] = 1, 8
    next_capture = launched()
    for call in (other_stream, next_capture):
        assert (call.at, call.early) == (1, False)
    words = {call.words.data_ptr() for call in (first[0], other_stream, next_capture)}
    assert len(words) == 3


def test_counters_that_are_left_at_zero_do_not_reach_into_arrivals(capture):
    words = workspace.arrivals(CUDA).words
    flags = workspace.flags(CUDA, 1000)
    assert flags.untyped_storage().data_ptr() == words.untyped_storage().data_ptr()
    assert flags.data_ptr() + flags.nbytes <= words.data_ptr()
    assert (words.data_ptr() - flags.data_ptr()) % 16 == 0  # a pointer's alignment is part of a compiled form


def test_without_words_laid_by_nobody_goes_by_the_count(capture, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: torch.zeros(*shape, **options))
    capture["number"] = {}
    assert not workspace.arrivals(CUDA).early
    assert not workspace.arrivals(torch.device("meta")).early
