"""From what the user wrote to reward functions: a built-in name, or `FILE.py:FUNCTION`.

A file is Python code that runs with the user's rights. It is loaded only when the user names it on the command line
or hands it to this function; recipes, checkpoints and datasets cannot name one.
"""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import EXTRACTORS, Extractor
from qerl_compile.rl.rewards.answer import AnswerReward, gsm8k
from qerl_compile.rl.rewards.score import RewardFunction, reward_name
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.tasks.task import Task

BUILT_IN = ("answer", "gsm8k")


def resolve_rewards(specs: Sequence[str], task: Task, extractor: Extractor = "final") -> list[RewardFunction]:
    """The reward functions of a run, checked before it starts.

    Args:
        specs: built-in names (`answer`, `gsm8k`) or `FILE.py:FUNCTION`.
        task: what judges answers for `answer`.
        extractor: how `answer` finds the answer in a completion.

    Raises:
        TaskError: none given, an unknown name, a file that cannot be used, or two functions of one name.
    """
    if not specs:
        raise TaskError(where="--reward", expected="at least one", got="none", do="Give --reward answer.")
    functions = [resolve_reward(spec, task, extractor) for spec in specs]
    names = [reward_name(function) for function in functions]
    for name in names:
        if names.count(name) > 1:
            do = "Rename one: metrics are logged by name."
            raise TaskError(where="--reward", expected="different names", got=f"{name!r} twice", do=do)
    return functions


def resolve_reward(spec: str, task: Task, extractor: Extractor = "final") -> RewardFunction:
    """One reward function; see `resolve_rewards`."""
    if extractor not in EXTRACTORS:
        do = f"Choose one of {', '.join(EXTRACTORS)}."
        raise TaskError(where="extractor", expected="a known rule", got=repr(extractor), do=do)
    if spec == "answer":
        return AnswerReward(task, extractor)
    if spec == "gsm8k":
        return gsm8k
    path, colon, name = spec.rpartition(":")
    if not (colon and path.endswith(".py") and name):
        do = f"Choose one of {', '.join(BUILT_IN)}, or write FILE.py:FUNCTION."
        raise TaskError(where="--reward", expected="a built-in name or a file's function", got=repr(spec), do=do)
    return load_function(Path(path), name)


def load_function(path: Path, name: str) -> RewardFunction:
    """The function `name` of the Python file `path`, which is run to get it.

    Raises:
        TaskError: there is no such file or function, the file raises, or the function does not take keywords.
    """
    where = f"{path}:{name}"
    if not path.is_file():
        raise TaskError(where=where, expected="a Python file", got="no such file", do="Correct the path.")
    module_name = f"qerl_reward_{path.stem}_{derive_seed(str(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise TaskError(where=where, expected="a Python file", got="one Python cannot load", do="Name it *.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling of the file's own classes look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        got = f"{type(error).__name__}: {error}"
        raise TaskError(where=where, expected="a file that imports", got=got, do="Correct the file.") from error
    function: RewardFunction | None = getattr(module, name, None)
    if function is None or not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        do = f"The file defines {', '.join(own) or 'nothing'}."
        raise TaskError(where=where, expected="a function", got=repr(function), do=do)
    check_signature(function, where)
    return function


def check_signature(function: Any, where: str) -> None:
    """Refuse a function that could not be called with keywords and columns it does not name."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if inspect.iscoroutinefunction(function) or not takes_any or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise TaskError(
            where=where,
            expected="def f(completions, **kwargs), not async",
            got=f"parameters {', '.join(sorted(named)) or 'none'}",
            do="Take keywords and end the parameters with **kwargs.",
        )
