"""Record the part of vLLM's interface that `VllmSampler` uses, from source trees, without running or installing any.

    pip download --no-deps vllm==0.24.0 && unzip vllm-0.24.0-*.whl 'vllm/*.py' -d 0.24.0
    python tests/rl/rollout/record_vllm_protocol.py 0.10.2 0.24.0 0.33.0

The name of each directory is its version. Signatures and fields are read with `ast`: names, kinds and the text of
defaults, no code. The result, vllm_protocol.json, is what fake_vllm.py builds its refusals from.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).with_name("vllm_protocol.json")


def tree(root: Path, *candidates: str) -> ast.Module:
    """The first of these files that the version has; vLLM has moved some."""
    found = next(path for path in (root / "vllm" / name for name in candidates) if path.exists())
    return ast.parse(found.read_text(encoding="utf-8"))


def class_of(module: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)


def fields(module: ast.Module, name: str) -> dict[str, str | None]:
    """Annotated fields of a class that a constructor takes, in order, with the text of their defaults."""
    return {
        node.target.id: None if node.value is None else ast.unparse(node.value)
        for node in class_of(module, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_"
    }


def method(module: ast.Module, cls: str, name: str) -> list[list[str | None]]:
    """Parameters of a method after self: name, kind as inspect calls it, text of the default."""
    found = [node for node in class_of(module, cls).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return list(parameters(found[-1].args))  # overloads come before what they describe


def parameters(args: ast.arguments) -> Iterator[list[str | None]]:
    positional = args.args[1:]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for each, default in zip(positional, defaults, strict=True):
        yield [each.arg, "POSITIONAL_OR_KEYWORD", None if default is None else ast.unparse(default)]
    if args.vararg:
        yield [args.vararg.arg, "VAR_POSITIONAL", None]
    for each, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield [each.arg, "KEYWORD_ONLY", None if default is None else ast.unparse(default)]
    if args.kwarg:
        yield [args.kwarg.arg, "VAR_KEYWORD", None]


def choices(module: ast.Module, *names: str) -> list[str | int]:
    """The values of `NAME = Literal[...]`, `NAME = (...)` or `class NAME(Enum)`, whichever the version has."""
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            return sorted(ast.literal_eval(ast.unparse(node.value).removeprefix("Literal")))
        if isinstance(node, ast.ClassDef) and node.name in names:
            return sorted(ast.literal_eval(each.value) for each in node.body if isinstance(each, ast.Assign))
    raise LookupError(*names)


def exports(module: ast.Module) -> list[str]:
    found = [n for n in ast.walk(module) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return sorted(ast.literal_eval(found[0].value))


def assigned(module: ast.Module, cls: str) -> list[str]:
    """Attributes that `__init__` sets on self."""
    init = next(n for n in class_of(module, cls).body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    targets = [t for n in ast.walk(init) if isinstance(n, ast.Assign) for t in n.targets]
    return [t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"]


def protocol(root: Path) -> dict[str, object]:
    llm = tree(root, "entrypoints/llm.py")
    outputs = tree(root, "outputs.py")
    model_config = tree(root, "config/model.py", "config/__init__.py")
    worker = class_of(tree(root, "v1/worker/gpu_worker.py"), "Worker")
    return {
        "vllm": exports(tree(root, "__init__.py")),
        "LLM.__init__": method(llm, "LLM", "__init__"),
        "LLM.generate": method(llm, "LLM", "generate"),
        "LLM.collective_rpc": method(llm, "LLM", "collective_rpc"),
        "LLM.reset_prefix_cache": method(llm, "LLM", "reset_prefix_cache"),
        "EngineArgs": list(fields(tree(root, "engine/arg_utils.py"), "EngineArgs")),
        "SamplingParams": fields(tree(root, "sampling_params.py"), "SamplingParams"),
        "TokensPrompt": list(fields(tree(root, "inputs/llm.py", "inputs/data.py"), "TokensPrompt")),
        "LoRARequest": fields(tree(root, "lora/request.py"), "LoRARequest"),
        "RequestOutput": assigned(outputs, "RequestOutput"),
        "CompletionOutput": list(fields(outputs, "CompletionOutput")),
        "Logprob": list(fields(tree(root, "logprobs.py", "sequence.py"), "Logprob")),
        "max_lora_rank": choices(tree(root, "config/lora.py"), "MaxLoRARanks", "possible_max_ranks"),
        "LogprobsMode": choices(model_config, "LogprobsMode"),
        "Worker": sorted(node.name for node in worker.body if isinstance(node, ast.FunctionDef)),
    }


def main(roots: list[str]) -> None:
    recorded = {Path(root).name: protocol(Path(root)) for root in roots}
    # One line per entry: a diff between versions, or between recordings, then shows what changed.
    lines = (
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in each.items())
        + "\n }"
        for version, each in recorded.items()
    )
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
