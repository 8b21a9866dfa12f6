"""The next command, as each command prints it: complete, quoted for a shell, and ready to run.

Output directories are named after what they are made from, so that nothing is left for the user to fill in.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

# A task that small models learn within minutes. It has 200 questions; about half of them are held out.
TASK = "rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
EVAL_SIZE = "train.eval_size=64"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank; its default is 16."""


def transform_command(model: str, recipe: str | None = None, sets: Sequence[str] = ()) -> str:
    """Return the command that packs a model."""
    return _join("transform", model, *_recipe(recipe, sets), "-o", beside(model, "nvfp4"))


def train_command(model: object, recipe: str | None = None, sets: Sequence[str] = ()) -> str:
    """Return the command that trains on an easy task."""
    sets = sets if any(each.startswith("train.eval_size=") for each in sets) else [*sets, EVAL_SIZE]
    prefix = ["--assistant-prefix", "{expression} ="]
    return _join("train", model, *_recipe(recipe, sets), "--task", TASK, *prefix, "-o", beside(model, "run"))


def export_command(run: object, *, packed: bool) -> str:
    """Return the command that exports a run: the packed base for vLLM, or the adapter if nothing is packed."""
    target = "vllm" if packed else "peft"
    return _join("export", run, "--target", target, "-o", beside(run, target))


def report_command(run: object) -> str:
    """Return the command that draws a run."""
    return _join("report", run, "-o", f"{beside(run, 'report')}.html")


def eval_command(run: object) -> str:
    """Return the command that measures a run with several samples per held-out item."""
    return _join("eval", run, "--samples", 8)


def inspect_command(directory: object) -> str:
    """Return the command that tells what a checkpoint is."""
    return _join("inspect", directory)


def serve_command(target: str, model: object, adapter: object = None, rank: int = 0) -> str:
    """Return the command of the serving engine, or the Python that opens the directory.

    Args:
        target: what was exported for, without a version; a peft adapter is served by vLLM.
        model: directory or hub id of the base, or of the graph.
        adapter: directory of an adapter to serve with it.
        rank: the adapter's largest rank.
    """
    if target == "tensorrt-llm":
        return shlex.join(["trtllm-serve", str(model)])
    if target == "transformers":
        opening = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(model)!r})"
        return shlex.join(["python", "-c", f"import qerl_compile; {opening}"])
    if target == "onnx":
        graph = str(Path(str(model)) / "model.onnx")
        return shlex.join(
            ["python", "-c", f"import onnx; print(onnx.load({graph!r}, load_external_data=False).graph.input)"]
        )
    if target == "sglang":
        words = ["python", "-m", "sglang.launch_server", "--model-path", model]
        return shlex.join(map(str, [*words, *(["--lora-paths", f"trained={adapter}"] if adapter else [])]))
    words = ["vllm", "serve", model]
    if adapter:
        limit = next((each for each in VLLM_RANKS if each >= rank), rank)
        words += ["--enable-lora", "--max-lora-rank", limit, "--lora-modules", f"trained={adapter}"]
    return shlex.join(map(str, words))


def beside(model: object, suffix: str) -> str:
    """Return the name of an output made from `model`: beside a directory, in the working directory for a hub id."""
    text = str(model)
    path = Path(text)
    return f"{path}-{suffix}" if path.is_dir() and path.name else f"{path.name or 'model'}-{suffix}"


def _recipe(recipe: str | None, sets: Sequence[str]) -> list[str]:
    return [*(["--recipe", recipe] if recipe else []), *(word for each in sets for word in ("--set", each))]


def _join(*words: object) -> str:
    return shlex.join(["qerl-compile", *map(str, words)])
