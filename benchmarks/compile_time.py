"""Where the seconds before the first training step go: one GRPO step with empty caches, and again in a new process.

    python -m benchmarks.compile_time --json OUT                           on a GPU: 2 layers of the 32B shape
    python -m benchmarks.compile_time --json OUT --no-rehearsal            the same without kernels compiled ahead
    python -m benchmarks.compile_time --size tiny --rows 8 --new-tokens 8 --device cpu

Layers share graphs and kernels, so two are enough: with 64 the same is compiled. Each measurement is a process of its
own; both use one fresh directory for the caches of Inductor, AOTAutograd and Triton. What is said of it:

    seconds      imports, model, trainer, step 1 (rollout, update), step 2; step 1 less step 2 is what compiling costs
    graphs       each that Dynamo captured: seconds in all, in AOTAutograd and the passes, in Inductor; why, if again
    kernels      that Triton compiled on the main thread, ours and Inductor's, and those that it found in its cache
    rehearsal    forms that other processes compiled meanwhile (qerl_compile/warm_up.py), and for how long

qwen32b_compile.py has the number that counts, with a whole model loaded; this explains it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

GRAPH = ("entire_frame_compile_time_s", "backend_compile_time_s", "inductor_compile_time_s", "code_gen_time_s")


def watch_triton() -> dict[str, list[tuple[float, bool]]]:
    """Listen to Triton's compilations on this process: whose kernel → (seconds, found in the cache)."""
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    try:
        from triton import knobs
    except ImportError:  # torch's CPU build on a machine without it
        return found

    def listener(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        module = getattr(getattr(src, "fn", None), "__module__", "")
        whose = "ours" if module.startswith("qerl_compile") else "inductor"
        found[whose].append((times.total / 1e6, cache_hit))

    knobs.compilation.listener = listener
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run two steps in this process."""
    seconds, begin = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[name], begin = now - begin, now

    import torch
    import torch._dynamo.utils as dynamo

    from benchmarks import data_parallel, random_models
    from qerl_compile.recipe import Recipe
    from qerl_compile.rl.first_step import rehearse_first_step
    from qerl_compile.rl.prompts import PromptFormat
    from qerl_compile.rl.ranks import Ranks
    from qerl_compile.rl.trainer import Trainer
    from qerl_compile.transforming import state_of
    from tests.rl.toy import words

    lap("imports")
    kernels = watch_triton()
    random_models.SHAPES.setdefault("tiny", TINY)
    model = random_models.random_model(options.size, "nvfp4", layers=options.layers, device=options.device)
    lap("model")
    settings = data_parallel.SETTINGS | {
        "prompts_per_step": options.rows // 8, "rollout_batch": options.rows, "max_new_tokens": options.new_tokens,
    }  # fmt: skip
    recipe = Recipe.named("qerl-nvfp4-aqn").with_overrides(f"train.{key}={value}" for key, value in settings.items())
    rehearsal = None
    if not options.no_rehearsal:
        device = torch.device(options.device)
        rehearsal = rehearse_first_step(model, state_of(model).plan, recipe.train, device)
    sampler = None
    if options.no_rehearsal:  # a trainer starts one unless it is handed a sampler
        from qerl_compile.rl.rollout import PagedSampler

        sampler = PagedSampler(model, rows=options.rows)
    trainer = Trainer(
        model, words(), recipe, data_parallel.Task(), [data_parallel.reward], PromptFormat(), "text", lambda row: None,
        ranks=Ranks.join(), sampler=sampler, rehearsal=rehearsal,
    )  # fmt: skip
    lap("trainer")
    parts = {}
    for step in (1, 2):
        row = trainer.step(step)
        lap(f"step {step}")
        parts |= {f"step {step}: {phase}": row[f"time/{phase}"] for phase in ("rollout", "update")}
    outcome = None if trainer.rehearsal is None else trainer.rehearsal.wait(120)
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds | parts,
        "graphs": [graph_row(metrics) for metrics in dynamo.get_compilation_metrics()],
        "kernels": {
            whose: {
                "compiled": sum(not hit for _, hit in all_),
                "compiled_s": sum(s for s, hit in all_ if not hit),
                "found": sum(hit for _, hit in all_),
            }
            for whose, all_ in kernels.items()
        },
        "caches": {name: count for kind in ("inductor", "aot_autograd") for name, count in dynamo.counters[kind].items()
                   if "cache" in name},
        "rehearsal": None if outcome is None else outcome._asdict(),
    }  # fmt: skip


TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip


def graph_row(metrics: Any) -> dict[str, Any]:
    """What Dynamo says of one graph."""
    row = {name: getattr(metrics, name, None) for name in ("compile_id", "co_name", "graph_node_count", *GRAPH)}
    return row | {"again_because": getattr(metrics, "recompile_reason", None)}


def in_a_process(arguments: list[str], directory: Path) -> dict[str, Any]:
    """Measure in a new process whose caches lie in `directory`."""
    result = directory / "result.json"
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"), "TRITON_CACHE_DIR": str(directory / "triton")}
    command = [sys.executable, "-m", "benchmarks.compile_time", *arguments, "--child", str(result)]
    subprocess.run(command, check=True, env=os.environ | caches)
    return json.loads(result.read_text(encoding="utf-8"))


def report(runs: dict[str, dict[str, Any]]) -> str:
    """The table, and a line for each graph, kernel and cache."""
    first = next(iter(runs.values()))
    names = list(first["seconds"])
    lines = [f"{first['device']}, {first['cores']} cores, torch {first['torch']}", ""]
    lines += [f"| caches | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run, result in runs.items():
        lines.append(f"| {run} | " + " | ".join(f"{result['seconds'][name]:.1f}" for name in names) + " |")
    for run, result in runs.items():
        lines += ["", f"{run}: {len(result['graphs'])} graphs; caches {result['caches']}; "
                  f"kernels on the main thread {result['kernels']}; rehearsal {result['rehearsal']}"]  # fmt: skip
        for graph in result["graphs"]:
            times = " / ".join(f"{graph[name]:.1f}" if graph[name] else "0" for name in GRAPH)
            again = f"  again: {graph['again_because']:.160}" if graph["again_because"] else ""
            lines.append(f"  {graph['compile_id']} {graph['co_name']}, {graph['graph_node_count']} nodes: "
                         f"{times} s in all / in the backend / in Inductor / in its code{again}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="32B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=128, help="sequences of a step, in groups of 8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-rehearsal", action="store_true", help="compile kernels at their first launch")
    parser.add_argument("--json", default="compile_time.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        Path(options.child).write_text(json.dumps(measure(options), default=str), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as directory:
        runs = {name: in_a_process(sys.argv[1:], Path(directory)) for name in ("empty", "filled")}
    Path(options.json).write_text(json.dumps(runs, indent=1), encoding="utf-8")
    print(report(runs))


if __name__ == "__main__":
    main()
