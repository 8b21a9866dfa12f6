import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qerl_compile.errors import TaskError
from qerl_compile.rl.advantages import group_advantages
from qerl_compile.rl.rewards import (
    AnswerReward,
    Failure,
    Outcome,
    Outcomes,
    close_rewards,
    completion_text,
    gsm8k,
    resolve_reward,
    resolve_rewards,
    score,
)
from qerl_compile.rl.tasks import Row, Task, columns


class Exact(Task):
    """A task that judges by equality and fails on the answer 13."""

    spec = "exact"

    def train_row(self, seed: int, position: int) -> Row:
        return {"prompt": "p", "answer": str(position)}

    def held_out(self, count: int | None = None) -> list[Row]:
        return []

    def is_correct(self, answer: str | None, row: Row) -> bool:
        if answer == "13":
            raise TaskError(where="exact", expected="a lucky number", got="13", do="Avoid it.")
        return answer == row["answer"]


def constant(value: object, name: str = "constant"):
    def reward(completions: list, **kwargs: object) -> object:
        return value

    reward.__name__ = name
    return reward


def call(functions: list, count: int = 2, **more):
    texts = ["x"] * count
    return score(functions, prompts=texts, completions=texts, completion_ids=[[1]] * count, columns={}, **more)


def test_the_answer_is_extracted_by_the_chosen_rule_and_judged_by_the_task() -> None:
    rows = [{"prompt": "p", "answer": answer} for answer in ("7", "7", "-7", "olleh")]
    completions = [" 7. Next 9", "it is 9", " -7", "say\nolleh"]
    first, last = AnswerReward(Exact(), "first_number"), AnswerReward(Exact(), "final")
    given = {"prompts": ["p"] * 4, "completion_ids": [[1]] * 4, "trainer_state": object(), **columns(rows)}
    assert first(completions=completions, **given) == [1.0, 0.0, 1.0, 0.0]
    assert last(completions=completions, **given) == [0.0, 0.0, 1.0, 1.0]
    assert (first.__name__, first.failures) == ("answer", 0)


def test_a_judge_that_fails_gives_none_and_is_counted() -> None:
    reward = AnswerReward(Exact())
    assert reward(completions=["13", "7"], answer=["7", "7"]) == [None, 1.0]
    assert reward.failures == 1
    assert "lucky" in reward.last_failure


def test_the_answer_reward_works_on_a_real_task() -> None:
    task = Task.parse("rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1")
    rows = task.train_rows(0, 0, 20)
    right = [[{"role": "assistant", "content": f" {row['answer']}"}] for row in rows]
    wrong = [[{"role": "assistant", "content": f" {int(row['answer']) + 1}"}] for row in rows]
    reward = AnswerReward(task, "first_number")
    assert reward(completions=right, **columns(rows)) == [1.0] * 20
    assert reward(completions=wrong, **columns(rows)) == [0.0] * 20


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("48 + 24 = 72\n#### 72", "work\n#### 72", 1.0),
        ("I think 72.", "work\n#### 72", 1.0),
        ("so $70,000", "work\n#### 70,000", 1.0),
        ("-72", "72", 0.0),
        ("7", "#### 72", 0.0),
        ("no idea", "#### 72", 0.0),
        ("72", "seventy-two", None),
    ],
)
def test_gsm8k_compares_final_numbers(completion: str, answer: str, expected: float | None) -> None:
    assert gsm8k(completions=[completion], answer=[answer], other="ignored") == [expected]


def test_completions_come_as_text_or_messages() -> None:
    assert completion_text("abc") == "abc"
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "ab"


def test_functions_are_called_with_trls_keywords() -> None:
    seen = {}

    def spy(**kwargs: object) -> list[float]:
        seen.update(kwargs)
        return [1.0]

    score([spy], prompts=["p"], completions=["c"], completion_ids=[[5, 2]], columns={"answer": ["7"], "level": [3]})
    helpers = {"log_metric": seen.pop("log_metric"), "log_extra": seen.pop("log_extra")}
    assert all(callable(helper) for helper in helpers.values())
    assert seen.pop("trainer_state") is None
    assert seen == {"prompts": ["p"], "completions": ["c"], "completion_ids": [[5, 2]], "answer": ["7"], "level": [3]}


def test_metrics_that_functions_log_are_averaged_and_extras_kept() -> None:
    def first(completions, log_metric, log_extra, **kwargs):
        log_metric("share", 1)
        log_metric("share", 0.5)
        log_extra("parsed", ["7", None])
        log_extra("seen", [{"a"}, 3])
        return [1.0, 2.0]

    def second(completions, log_metric, **kwargs):
        log_metric("share", 0.0)
        log_metric("other", True)
        return [0.0, 0.0]

    scores = call([first, second])
    assert scores.metrics == {"share": 0.5, "other": 1.0}
    assert scores.extras == {"parsed": ["7", None], "seen": ["{'a'}", 3]}


def test_an_extra_that_is_not_one_value_per_completion_is_an_error() -> None:
    def wrong(completions, log_extra, **kwargs):
        log_extra("parsed", ["7"])

    with pytest.raises(ValueError, match=r"log_extra\('parsed', ...\) needs 2 values, one per completion"):
        call([wrong])


class Judge:
    """Knows the three outcomes: a score, a timeout, an error, not applicable."""

    __name__ = "judge"

    def __init__(self, *each: Outcome) -> None:
        self.each = each

    def outcomes(self, count: int, given: dict) -> Outcomes:
        return Outcomes(self.each, repeats=2)


RIGHT, LATE, BROKEN = Outcome("score", 1.0), Outcome("timeout", message="no"), Outcome("error", message="oh")


def test_a_timeout_or_an_error_makes_the_total_nan_and_is_counted_and_none_does_neither() -> None:
    scores = call([Judge(RIGHT, LATE, BROKEN, Outcome("score")), constant([0.5] * 4)], count=4)
    nan = math.nan
    columns = torch.tensor([[1.0, nan, nan, nan], [0.5] * 4], dtype=torch.float64)
    torch.testing.assert_close(scores.per_function_NF.T, columns, equal_nan=True, rtol=0, atol=0)
    total = torch.tensor([1.5, nan, nan, 0.5], dtype=torch.float64)
    torch.testing.assert_close(scores.total_N, total, equal_nan=True, rtol=0, atol=0)
    assert scores.failures == (Failure("judge", 1, "timeout", "no"), Failure("judge", 2, "error", "oh"))
    assert [scores.count(name, kind) for name in scores.names for kind in ("timeout", "error")] == [1, 1, 0, 0]
    assert scores.repeats == {"judge": 2, "constant": 0}


def test_a_failed_completion_gets_no_advantage_and_leaves_its_group_alone() -> None:
    scores = call([Judge(RIGHT, LATE, BROKEN, Outcome("score", 0.0))], count=4)
    advantages = group_advantages(scores.total_N, 4)
    assert advantages.advantages_N.tolist() == pytest.approx([0.5 / (0.5**0.5 + 1e-4), 0, 0, -0.5 / (0.5**0.5 + 1e-4)])
    assert advantages.group_mean_P.tolist() == [0.5]


def test_a_function_that_fails_on_every_completion_is_an_error_that_names_it() -> None:
    with pytest.raises(
        TaskError, match=r"reward function judge: .*; got 1 timeouts and 1 errors; the first: no"
    ) as raised:
        call([constant([1.0, 1.0]), Judge(LATE, BROKEN)])
    assert "train.reward_timeout" in raised.value.do
    assert call([Judge(LATE, Outcome("score"))]).total_N.isnan().all()


def test_scores_are_weighted_and_none_is_left_out() -> None:
    a, b = constant([1.0, None, None, 0], "a"), constant((0.5, 2, None, None), "b")
    scores = call([a, b], count=4, weights=[1.0, 0.25])
    assert scores.names == ("a", "b")
    nan = math.nan
    expected = torch.tensor([[1.0, 0.5], [nan, 2.0], [nan, nan], [0.0, nan]], dtype=torch.float64)
    torch.testing.assert_close(scores.per_function_NF, expected, equal_nan=True, rtol=0, atol=0)
    total = torch.tensor([1.125, 0.5, nan, 0.0], dtype=torch.float64)
    torch.testing.assert_close(scores.total_N, total, equal_nan=True, rtol=0, atol=0)


def test_tensors_and_booleans_are_numbers() -> None:
    assert call([constant(torch.tensor([1.0, 0.5]))]).total_N.tolist() == [1.0, 0.5]
    assert call([constant([True, False])]).total_N.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0], "2 values; got 1"),
        ([1.0, 1.0, 1.0], "2 values; got 3"),
        ([], "2 values; got 0"),
        ([1.0, math.nan], "completion 1: expected a finite number; got nan"),
        ([math.inf, 1.0], "completion 0: expected a finite number; got inf"),
        ([1.0, "1"], "got '1'"),
        ([1.0, [1.0]], "a finite number"),
        (1.0, "a list of numbers; got float"),
        (None, "a list of numbers; got NoneType"),
        ({"a": 1, "b": 2}, "a list of numbers; got dict"),
        ("ab", "a list of numbers; got str"),
        (torch.zeros(2, 2), "a finite number"),
    ],
)
def test_a_bad_return_value_is_an_error_and_never_a_zero(output: object, message: str) -> None:
    with pytest.raises(TaskError, match="reward function constant") as raised:
        call([constant(output)])
    assert message in str(raised.value)


async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0, 0.0]


def test_an_async_function_is_awaited_also_inside_a_running_loop() -> None:
    assert call([slow]).total_N.tolist() == [1.0, 0.0]

    async def notebook():
        return call([slow, constant([1.0, 1.0])])

    assert asyncio.run(notebook()).total_N.tolist() == [2.0, 1.0]


def test_an_exception_of_an_async_function_comes_through() -> None:
    async def mine(**kwargs):
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        call([mine])


def test_the_numbers_of_numpy_and_torch_are_numbers() -> None:
    values = [np.float32(0.5), np.int64(2), np.bool_(True), torch.tensor(3.0), torch.tensor(1, dtype=torch.int8)]
    assert call([constant(values)], count=5).total_N.tolist() == [0.5, 2.0, 1.0, 3.0, 1.0]


@pytest.mark.parametrize(
    "value", [10**400, -(10**5000), np.float32("nan"), torch.tensor(math.inf), 1j, object], ids=list("abcdef")
)
def test_numbers_that_are_not_finite_and_other_objects_are_errors(value: object) -> None:
    with pytest.raises(TaskError, match="completion 1: expected a finite number"):
        call([constant([1.0, value])])


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [math.nan], [math.inf]])
def test_weights_must_fit_the_functions(weights: list[float]) -> None:
    with pytest.raises(TaskError, match="one finite number per reward function"):
        call([constant([1, 1])], weights=weights)


def test_an_exception_in_a_reward_keeps_its_type_and_gains_a_name() -> None:
    def mine(**kwargs: object) -> list[float]:
        raise KeyError("gone")

    with pytest.raises(KeyError) as raised:
        call([mine])
    assert raised.value.__notes__ == ["in the reward function mine"]


FILE = """
from dataclasses import dataclass

LIMIT = 5

@dataclass
class Box:
    value: float

def short(completions, **kwargs):
    return [Box(float(len(c) <= LIMIT)).value for c in completions]

def no_kwargs(completions):
    return [0.0]

def positional(completions, /, **kwargs):
    return [0.0]

"""


def test_a_function_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    (function,) = resolve_rewards([f"{path}:short"], Exact())
    assert function(completions=["abc", "abcdefg"], extra=[1, 2]) == [1.0, 0.0]
    assert call([function]).names == ("short",)
    close_rewards([function, gsm8k])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "The file defines Box, short, no_kwargs, positional"),
        ("LIMIT", "expected a function; got 5"),
        ("no_kwargs", r"end the parameters with \*\*kwargs"),
        ("positional", r"end the parameters with \*\*kwargs"),
    ],
)
def test_a_file_function_that_cannot_be_called_as_trl_does_is_refused(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    with pytest.raises(TaskError, match=message):
        resolve_reward(f"{path}:{name}", Exact())


def test_files_that_do_not_load_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        resolve_reward(f"{tmp_path}/broken.py:f", Exact())
    with pytest.raises(TaskError, match="no such file"):
        resolve_reward(f"{tmp_path}/absent.py:f", Exact())


@pytest.mark.parametrize("spec", ["", "answers", "os.system", "file.py", "file.py:", ":f", "file.txt:f"])
def test_a_reward_is_never_a_dotted_path(spec: str) -> None:
    with pytest.raises(TaskError, match=r"Choose one of answer, gsm8k, math, or write FILE\.py:FUNCTION"):
        resolve_reward(spec, Exact())


def test_built_in_names_resolve() -> None:
    first, second = resolve_rewards(["answer", "gsm8k"], Exact(), "last_number")
    assert isinstance(first, AnswerReward)
    assert first.extractor == "last_number"
    assert second is gsm8k


def test_no_reward_twin_names_and_unknown_rules_are_refused() -> None:
    with pytest.raises(TaskError, match="at least one"):
        resolve_rewards([], Exact())
    with pytest.raises(TaskError, match="'answer' twice"):
        resolve_rewards(["answer", "answer"], Exact())
    with pytest.raises(TaskError, match="Choose one of final, marked"):
        resolve_reward("answer", Exact(), "guess")  # pyright: ignore[reportArgumentType] - the point of the test
