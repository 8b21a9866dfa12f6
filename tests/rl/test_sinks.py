"""Sinks: numbers reach the other program, nothing of it can stop a run, and a missing package is named."""

import sys
from types import SimpleNamespace

import pytest
import torch

from qerl_compile.errors import TaskError
from qerl_compile.rl.sinks import KINDS, Sink, as_number, check_sink, sink

ROW = {
    "step": 3,
    "reward": 0.5,
    "grad_norm": float("nan"),
    "name": "x",
    "flag": True,
    "none": None,
    "t": torch.tensor(2),
}


class Service:
    """Stands for trackio and wandb: the calls that we make, with the keywords that their signatures have."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, *, project, name, config, dir=None, resume=None, embed=None):
        self.started.append((project, name, config))
        return self

    def log(self, metrics, step=None):
        self.logged.append((metrics, step))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["trackio", "wandb"])
def service(request, monkeypatch):
    made = Service()
    monkeypatch.setitem(sys.modules, request.param, SimpleNamespace(init=made.init))
    return SimpleNamespace(kind=request.param, calls=made)


def test_numbers_of_a_row_arrive_under_their_names_at_their_step(service, tmp_path):
    with sink(service.kind, tmp_path / "run7", {"recipe": "r"}) as write:
        write(ROW)
        write({"reward": 1.0})  # a row without a step has no place on a curve
    assert service.calls.started == [("qerl-compile", "run7", {"recipe": "r"})]
    assert service.calls.logged == [({"reward": 0.5, "t": 2.0}, 3)]
    assert service.calls.finished == 1


def test_a_closed_sink_takes_nothing_and_closes_once(service, tmp_path):
    write = sink(service.kind, tmp_path, {})
    write.close()
    write.close()
    write(ROW)
    assert service.calls.logged == []
    assert service.calls.finished == 1


def test_a_sink_that_fails_says_so_once_and_is_left_out():
    calls = []

    def log(numbers, step):
        calls.append(step)
        raise OSError("disk full")

    write = Sink("tensorboard", lambda: (log, lambda: calls.append("closed")))
    with pytest.warns(
        RuntimeWarning, match=r"tensorboard failed and is left out.*OSError: disk full.*metrics\.jsonl"
    ) as seen:
        for step in range(3):
            write({"step": step, "reward": 0.0})
        write.close()
    assert len(seen) == 1
    assert calls == [0]


def test_a_sink_that_cannot_start_or_close_does_not_stop_a_run():
    def refuse():
        raise RuntimeError("not logged in")

    with pytest.warns(RuntimeWarning, match="not logged in"):
        write = Sink("wandb", refuse)
    write(ROW)
    with pytest.warns(RuntimeWarning, match="not logged in"):
        Sink("wandb", lambda: (lambda numbers, step: None, refuse)).close()


def test_an_interrupt_inside_a_sink_is_no_failure_of_the_sink():
    def log(numbers, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sink("wandb", lambda: (log, lambda: None))(ROW)


@pytest.mark.parametrize(
    ("kind", "module", "install"),
    [
        ("tensorboard", "torch.utils.tensorboard", "qerl-compile[track]"),
        ("trackio", "trackio", "pip install trackio"),
        ("wandb", "wandb", "pip install wandb"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(kind, module, install, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail
    with pytest.raises(TaskError, match=f"--track {kind}: expected the package {kind}") as caught:
        sink(kind, tmp_path, {})
    assert install in caught.value.do
    with pytest.raises(TaskError, match=f"expected the package {kind}"):
        check_sink(kind)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(TaskError, match="expected one of tensorboard, trackio, wandb; got 'mlflow'"):
        sink("mlflow", tmp_path, {})
    assert len(KINDS) == 3


def test_tensorboard_gets_scalars_a_config_and_a_flush_after_each_row(monkeypatch, tmp_path):
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir):
            calls.append(("open", log_dir))

        def add_text(self, tag, text):
            calls.append(("text", tag, text))

        def add_scalar(self, tag, value, step):
            calls.append(("scalar", tag, value, step))

        def flush(self):
            calls.append(("flush",))

        def close(self):
            calls.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with sink("tensorboard", tmp_path, {"a": 1}) as write:
        write(ROW)
    assert calls == [
        ("open", str(tmp_path / "tensorboard")),
        ("text", "config", '    {\n      "a": 1\n    }'),
        ("scalar", "reward", 0.5, 3),
        ("scalar", "t", 2.0, 3),
        ("flush",),
        ("close",),
    ]


def test_the_real_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard", reason="the `track` extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with sink("tensorboard", tmp_path, {"a": 1}) as write:
        for step in (1, 2):
            write({"step": step, "reward": step / 4})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.5, 0.5), (True, None), ("1", None), (None, None), (float("inf"), None), (10**400, None)],
)
def test_what_counts_as_a_number(value, number):
    assert as_number(value) == number
