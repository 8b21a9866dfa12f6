"""The process behind a reward function: its start, its interface, its repeats, its end."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards import IsolatedReward, resolve_reward, resolve_rewards, score
from qerl_compile.rl.rewards.isolated import _Failure
from qerl_compile.rl.rewards.outcomes import Outcome, Outcomes
from qerl_compile.rl.tasks import Task, columns
from tests.rl.rewards.marked import NAME, left_behind, marked

FILE = """
import asyncio, os, sys, time
from pathlib import Path

calls = 0

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def modules(**kwargs):
    return [float(name in sys.modules) for name in kwargs["completions"]]

def process(completions, **kwargs):
    global calls
    calls += 1
    return [float(x) for x in (os.getpid(), os.getppid(), calls, os.getsid(0))]

def keywords(prompts, completion_ids, trainer_state, metadata, log_metric, log_extra, **kwargs):
    assert trainer_state is None and sorted(kwargs) == ["completions", "level"], kwargs
    log_metric("ids", sum(map(len, completion_ids)))
    log_extra("said", [repr(m) for m in metadata])
    return [1.0 if prompt == [{"role": "user", "content": "q"}] else None for prompt in prompts]

async def waits(completions, **kwargs):
    async def one(text):
        await asyncio.sleep(0.01)
        return float(len(text))
    return await asyncio.gather(*map(one, completions))

def raises_on_bad(completions, log_metric, log_extra, **kwargs):
    if "bad" in completions:
        raise ValueError("what?")
    log_metric("calls", 1)
    log_extra("upper", [text.upper() for text in completions])
    return length(completions)

def prints(completions, **kwargs):
    print("hello from the reward")
    print("and its errors", file=sys.stderr)
    return length(completions)

def reads(completions, **kwargs):
    return [float(Path(text).read_text()) for text in completions]

def grows(completions, **kwargs):
    if completions[0] == "bad":
        process.kept = bytearray(512 << 20)
    return [float(hasattr(process, "kept"))]

def forks(completions, **kwargs):
    for _ in completions[0]:
        if os.fork() == 0:
            time.sleep(1000)
    if len(completions[0]) > 256:
        time.sleep(1000)
    return length(completions)
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def isolated(file, monkeypatch):
    mark = uuid.uuid4().hex
    monkeypatch.setenv(NAME, mark)
    made = []

    def make(name: str, **more) -> IsolatedReward:
        settings = {"timeout": 20.0, **more}
        made.append(IsolatedReward(name, {"kind": "file", "path": str(file), "name": name}, **settings))
        return made[-1].load()

    yield make
    for reward in made:
        reward.close()
    assert left_behind(mark) == []


def test_a_worker_has_a_session_of_its_own_keeps_its_state_and_is_no_fork_of_this_process(isolated) -> None:
    reward = isolated("process")
    pid, parent, calls, session = reward(completions=["a"] * 4)
    assert (pid, parent, calls) == (session, reward.supervisor, 1)
    assert os.getpid() not in (pid, parent)
    assert reward(completions=["a"] * 4) == [pid, parent, 2, session]


def test_a_worker_loads_no_torch_numpy_or_transformers(isolated) -> None:
    known = ["torch", "numpy", "transformers", "pydantic", "qerl_compile.rl.trainer", "sys"]
    assert isolated("modules")(completions=known) == [0.0] * 5 + [1.0]


def test_the_keywords_of_trl_arrive_and_what_was_logged_comes_back(isolated) -> None:
    metadata = [{1: (2, 3)}, {"set": {4}}]
    given = {"completion_ids": [[1, 2], [3]], "columns": {"metadata": metadata, "level": [1, 2]}}
    prompts = [[{"role": "user", "content": "q"}], "q"]
    scores = score([isolated("keywords")], prompts=prompts, completions=["a", "b"], **given)
    assert scores.names == ("keywords",)
    assert scores.total_N[0] == 1.0
    assert scores.total_N[1].isnan()
    assert scores.failures == ()
    assert (scores.metrics, scores.extras) == ({"ids": 3.0}, {"said": [repr(m) for m in metadata]})


def test_async_functions_run_in_the_worker(isolated) -> None:
    assert isolated("waits")(completions=["a", "bcd"]) == [1.0, 3.0]


def test_a_batch_that_fails_is_repeated_one_by_one_and_the_others_keep_what_they_logged(isolated) -> None:
    outcomes = isolated("raises_on_bad").outcomes(3, {"completions": ["a", "bad", "abc"]})
    assert [outcome.value for outcome in outcomes.each] == [1.0, None, 3.0]
    assert [outcome.kind for outcome in outcomes.each] == ["score", "error", "score"]
    assert outcomes.each[1].message.startswith("ValueError: what? (rewards.py:32 in raises_on_bad < calling.py:")
    assert outcomes.extras == {"upper": ["A", None, "ABC"]}
    assert (outcomes.metrics, outcomes.repeats) == ({"calls": [1.0, 1.0]}, 3)


def test_called_as_a_function_it_raises_where_there_is_no_score(isolated) -> None:
    with pytest.raises(TaskError, match="raises_on_bad, completion 1: expected a score; got error: ValueError: what"):
        isolated("raises_on_bad")(completions=["a", "bad"], trainer_state=object(), log_metric=print, log_extra=print)


@pytest.mark.parametrize(("count", "share"), [(2, 0.5), (3, 1 / 3), (4, 0.25), (100, 0.25)])
def test_repeats_get_a_share_of_the_time_and_end_after_four_times_it(isolated, monkeypatch, count, share) -> None:
    """The clock is a list: the batch fails, and each completion alone takes all it gets."""
    reward = isolated("length", timeout=8.0)
    now, asked = [0.0], []

    def ask(size: int, given: dict, timeout: float) -> Outcomes | _Failure:
        asked.append((size, given["completions"], timeout))
        now[0] += timeout
        return _Failure(Outcome("timeout", message="late"))

    monkeypatch.setattr(reward, "_ask", ask)
    monkeypatch.setattr("qerl_compile.rl.rewards.isolated.time.monotonic", lambda: now[0])
    texts = [str(i) for i in range(count)]
    outcomes = reward.outcomes(count, {"completions": texts})
    alone = min(count, 16)
    assert asked == [(count, texts, 8.0)] + [(1, [text], pytest.approx(8 * share)) for text in texts[:alone]]
    assert now[0] <= 5 * 8.0 + 1e-9
    assert outcomes.repeats == alone
    messages = ["late"] * alone + ["not tried alone: 32 s went to others of its batch"] * (count - alone)
    assert [(o.kind, o.message) for o in outcomes.each] == [("timeout", message) for message in messages]


def test_one_completion_and_a_broken_interface_are_not_repeated(isolated, monkeypatch) -> None:
    reward = isolated("length")
    failure = Outcome("error", message="no list")
    monkeypatch.setattr(reward, "_ask", lambda *_: _Failure(failure, is_whole=True))
    assert reward.outcomes(3, {"completions": ["a"] * 3}) == Outcomes((failure,) * 3)
    monkeypatch.setattr(reward, "_ask", lambda *_: _Failure(failure))
    assert reward.outcomes(1, {"completions": ["a"]}) == Outcomes((failure,))


def test_what_a_function_prints_goes_to_the_log_or_nowhere(isolated, tmp_path, capfd) -> None:
    assert isolated("prints")(completions=["a"]) == [1.0]
    assert isolated("prints", log=tmp_path / "log.txt")(completions=["ab"]) == [2.0]
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "log.txt").read_text() == "hello from the reward\nand its errors\n"


def test_relative_paths_mean_the_directory_in_which_the_run_began(isolated, tmp_path, monkeypatch) -> None:
    (tmp_path / "number").write_text("7")
    monkeypatch.chdir(tmp_path)
    assert isolated("reads")(completions=["number"]) == [7.0]


def test_the_memory_limit_counts_and_a_process_that_hit_it_is_replaced(isolated) -> None:
    small, large = isolated("grows", memory_gib=0.25), isolated("grows", memory_gib=2.0)
    (outcome,) = small.outcomes(1, {"completions": ["bad"]}).each
    assert (outcome.kind, outcome.message.startswith("MemoryError")) == ("error", True)
    assert small(completions=["good"]) == [0.0]
    assert large(completions=["bad"]) == [1.0]
    assert large(completions=["good"]) == [1.0]


def test_a_function_may_start_256_processes_and_no_more(isolated) -> None:
    reward = isolated("forks", timeout=100.0)
    assert reward(completions=["x" * 20]) == [20.0]
    (outcome,) = reward.outcomes(1, {"completions": ["x" * 300]}).each
    assert outcome == Outcome("error", message="its process started more than 256 processes")
    assert reward(completions=["x" * 20]) == [20.0]


def test_a_column_that_cannot_be_sent_is_an_error_that_names_its_type(isolated) -> None:
    with pytest.raises(TaskError, match=r"reward function length: .*; got a builtins\.object\. .* Trainer\(rewards="):
        isolated("length").outcomes(1, {"completions": ["a"], "thing": [object()]})


def test_a_supervisor_that_is_killed_is_replaced_and_its_call_is_an_error(isolated, monkeypatch) -> None:
    reward = isolated("length")
    gone = reward.supervisor
    os.kill(gone, signal.SIGKILL)
    (outcome,) = reward.outcomes(1, {"completions": ["a"]}).each
    assert (outcome.kind, "a supervisor that ended" in outcome.message) == ("error", True)
    assert reward.supervisor != gone
    assert reward(completions=["abc"]) == [3.0]


def test_a_closed_reward_starts_again(isolated) -> None:
    reward = isolated("length")
    reward.close()
    reward.close()
    assert reward(completions=["abc"]) == [3.0]


def test_an_interrupt_in_the_trainer_does_not_mix_up_replies(isolated, monkeypatch) -> None:
    reward = isolated("length")

    def interrupt(deadline: float):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward, "_verdict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reward.outcomes(1, {"completions": ["a"]})
    assert reward(completions=["abc"]) == [3.0]


def test_threads_take_turns(isolated) -> None:
    reward = isolated("length")
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: reward(completions=["x" * n] * 5)})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [float(n)] * 5 for n in range(8)}


TRAINER = """
import os, signal, sys, time
from qerl_compile.rl.rewards import IsolatedReward
reward = IsolatedReward("length", {"kind": "file", "path": sys.argv[1], "name": "length"}, timeout=5.0).load()
child = os.fork()
if child == 0:
    time.sleep(100)
print(child, flush=True)
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()", "1 / 0"])
def test_nothing_outlives_the_trainer_however_it_ends(file, tmp_path, monkeypatch, end) -> None:
    """Even if a fork of the trainer, which holds its pipes open, lives on."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(NAME, mark)
    with (tmp_path / "child").open("w") as out:  # a pipe would stay open as long as the fork
        command = [sys.executable, "-c", TRAINER + end, str(file)]
        subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=60, check=False)
    child = int((tmp_path / "child").read_text())
    try:
        assert left_behind(mark, but=child) == []
        assert child in marked(mark)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_fork_of_the_trainer_that_ends_leaves_the_workers_alone(isolated) -> None:
    reward = isolated("length")
    child = os.fork()
    if child == 0:
        reward.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert reward(completions=["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import os; os._exit(3)", "its process ended: exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "its process ended: SIGSEGV"),
        ("while True: pass", "no result within 0.5 s"),
        ("f = dict", "expected def f"),
        ("def f(completions): pass", "expected def f"),
    ],
)
def test_a_file_that_does_not_load_is_refused_however_it_fails(tmp_path, text, message) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    reward = IsolatedReward("f", {"kind": "file", "path": str(path), "name": "f"}, timeout=1, load_timeout=0.5)
    with pytest.raises(TaskError, match=message):
        reward.load()


def test_rewards_that_were_made_are_ended_when_a_later_one_is_refused(file, monkeypatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(NAME, mark)
    task = Task.parse("rg:chain_sum")
    for specs in ([f"{file}:length", f"{file}:absent"], [f"{file}:length", f"{file}:length"]):
        with pytest.raises(TaskError):
            resolve_rewards(specs, task)
        assert left_behind(mark) == []


def test_answers_to_reasoning_gym_are_judged_in_a_process_that_can_be_killed(monkeypatch) -> None:
    """puzzle24 has sympy evaluate the answer, and this one is a number of 370 million digits."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(NAME, mark)
    task = Task.parse("rg:puzzle24")
    rows = task.train_rows(0, 0, 2)
    reward = resolve_reward("answer", task, "text", timeout=2.0)
    assert isinstance(reward, IsolatedReward)
    reward.load()
    assert len(list(Path(f"/proc/{reward.supervisor}/task").iterdir())) == 1  # it forks, and has imported numpy
    given = {"completions": ["9**9**9", "no idea"], **columns(rows)}
    kinds = [(outcome.kind, outcome.value) for outcome in reward.outcomes(2, given).each]
    assert kinds == [("timeout", None), ("score", 0.0)]
    assert len(marked(mark)) == 2
    reward.close()
    assert left_behind(mark) == []
