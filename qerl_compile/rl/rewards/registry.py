"""From what the user wrote to reward functions: a built-in name, or `FILE.py:FUNCTION`.

    answer          in this process for tasks from a file, whose judge is ours and takes linear time;
                    in a process of its own for reasoning_gym, whose scorers may hand an answer to sympy
    gsm8k           in this process: it compares two numbers of at most 400 digits
    math            in a process of its own: math-verify
    FILE.py:NAME    in a process of its own

A file is Python code that runs with the user's rights. It is loaded only when the user names it on the command line
or hands it to this function; recipes, checkpoints and datasets cannot name one.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import EXTRACTORS, Extractor
from qerl_compile.rl.rewards.answer import AnswerReward, gsm8k
from qerl_compile.rl.rewards.calling import RewardFunction, reward_name
from qerl_compile.rl.rewards.isolated import IsolatedReward
from qerl_compile.rl.tasks.task import ARROW, Task

BUILT_IN = ("answer", "gsm8k", "math")
TIMEOUT_S = 10.0


def resolve_rewards(
    specs: Sequence[str],
    task: Task,
    extractor: Extractor = "final",
    *,
    timeout: float = TIMEOUT_S,
    log: Path | None = None,
) -> list[RewardFunction]:
    """The reward functions of a run, checked before it starts. End their processes with `close_rewards`.

    Args:
        specs: built-in names (`answer`, `gsm8k`, `math`) or `FILE.py:FUNCTION`.
        task: what judges answers for `answer`.
        extractor: how `answer` finds the answer in a completion.
        timeout: seconds for a batch, for functions that run in a process of their own; see isolated.py.
        log: file to which what files print is appended; None drops it.

    Raises:
        TaskError: none given, an unknown name, a file that cannot be used, or two functions of one name.
    """
    if not specs:
        raise TaskError(where="--reward", expected="at least one", got="none", do="Give --reward answer.")
    functions: list[RewardFunction] = []
    try:
        for spec in specs:
            functions.append(resolve_reward(spec, task, extractor, timeout=timeout, log=log))
        names = [reward_name(function) for function in functions]
        for name in names:
            if names.count(name) > 1:
                do = "Rename one: metrics are logged by name."
                raise TaskError(where="--reward", expected="different names", got=f"{name!r} twice", do=do)
    except TaskError:
        close_rewards(functions)
        raise
    return functions


def resolve_reward(
    spec: str,
    task: Task,
    extractor: Extractor = "final",
    *,
    timeout: float = TIMEOUT_S,
    log: Path | None = None,
) -> RewardFunction:
    """One reward function; see `resolve_rewards`."""
    if extractor not in EXTRACTORS:
        do = f"Choose one of {', '.join(EXTRACTORS)}."
        raise TaskError(where="extractor", expected="a known rule", got=repr(extractor), do=do)
    if spec == "gsm8k":
        return gsm8k
    stages = [stage.strip() for stage in task.spec.split(ARROW)]  # of a curriculum; else the task itself
    if spec == "answer" and not any(stage.startswith("rg:") for stage in stages):
        return AnswerReward(task, extractor)
    path, colon, name = spec.rpartition(":")
    if spec == "answer":
        name, function = spec, {"kind": "answer", "task": task.spec, "extractor": extractor}
    elif spec == "math":
        if find_spec("math_verify") is None:
            do = "Install it: pip install 'qerl-compile[tasks]'."
            raise TaskError(where="--reward math", expected="the package math-verify", got="none installed", do=do)
        name, function = spec, {"kind": "math"}
    elif colon and path.endswith(".py") and name:
        function = {"kind": "file", "path": path, "name": name}
    else:
        do = f"Choose one of {', '.join(BUILT_IN)}, or write FILE.py:FUNCTION."
        raise TaskError(where="--reward", expected="a built-in name or a file's function", got=repr(spec), do=do)
    reward = IsolatedReward(name, function, timeout=timeout, log=log)
    return reward.load() if function["kind"] == "file" else reward  # ours loads meanwhile, as the model does


def close_rewards(functions: Iterable[RewardFunction]) -> None:
    """End the processes of those functions that have any."""
    for function in functions:
        if isinstance(function, IsolatedReward):
            function.close()
