"""Inside a worker: from the description of a reward function to the function.

The trainer sends a description, {"kind": "file", "path", "name"}, {"kind": "math"}, or {"kind": "answer", "task",
"extractor"}, and never code. A file is Python code that runs with the user's rights; it is loaded only because the
user named it on the command line or called `resolve_rewards` with it. Recipes, checkpoints and datasets cannot.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards.calling import RewardFunction, described
from qerl_compile.rl.seeds import derive_seed


def is_ours(description: dict[str, Any]) -> bool:
    """Whether the function comes with this package, so that making it runs no stranger's code."""
    return description["kind"] != "file"


def load(description: dict[str, Any]) -> RewardFunction:
    """The function that a description means.

    Raises:
        TaskError: it cannot be made; see `load_function`.
    """
    if description["kind"] == "file":
        return load_function(Path(description["path"]), description["name"])
    if description["kind"] == "math":
        from qerl_compile.rl.rewards.math_answer import MathReward

        return MathReward()
    from qerl_compile.rl.rewards.answer import AnswerReward
    from qerl_compile.rl.tasks.task import parse_task

    return AnswerReward(parse_task(description["task"]), description["extractor"])


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
    except BaseException as error:  # SystemExit too: a script with a main at its foot
        got = f"{type(error).__name__}: {error}"
        raise TaskError(where=where, expected="a file that imports", got=got, do="Correct the file.") from error
    function: RewardFunction | None = getattr(module, name, None)
    if function is None or not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        do = f"The file defines {', '.join(own) or 'nothing'}."
        raise TaskError(where=where, expected="a function", got=described(function), do=do)
    check_signature(function, where)
    return function


def check_signature(function: Any, where: str) -> None:
    """Refuse a function that could not be called with keywords and columns it does not name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # dict and other types of C have none
        parameters = []
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise TaskError(
            where=where,
            expected="def f(completions, **kwargs)",
            got=f"parameters {', '.join(sorted(named)) or 'none'}",
            do="Take keywords and end the parameters with **kwargs.",
        )
