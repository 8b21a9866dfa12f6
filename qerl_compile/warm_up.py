"""Start compiling a run's kernels in other processes, from the shapes of its model, before the run needs them.

The first training step of a 32B shape took 85 s on an H200 with cold caches; 38 s of it was Triton, one kernel after
another on the main thread while fifteen cores were idle. What will be launched follows from the plan (which linears are
packed, which share a product, which have adapters) and from a few numbers of the recipe, so it is known before a byte
of weights is read:

    rehearsal = rehearse(model, plan, device, decode_rows=(2, 4, 8), prefill_tokens=(512,), training_tokens=(4096,),
                         positions=768, page_tokens=64)
    ...                                            load weights, capture graphs, roll out
    rehearsal.wait()                               if somebody wants to know; nobody has to

kernels/rehearsal.py does it: it calls the launchers on meta tensors and compiles what they would have launched into
Triton's disk cache. The run neither waits nor depends on it. What fails is said once, by a warning in the log of this
module, and is then compiled by the run itself. A run that ends before its rehearsal stops it; one that is killed has it
end by itself.

Inductor's own kernels are compiled by workers of torch's, which take seconds to start. They start when the module that
has them is imported, so that is done here as well: torch would import it at the first graph.

The cache. Inductor sets TRITON_CACHE_DIR when it first makes a kernel, if nobody has: from then on Triton looks in
another directory than before. So it is set here, to the directory that Inductor will choose, before anything compiles.

What this module does not do: compile graphs (their caches are torch's; backend.py says what is in the key), or
kernels of MoE layers, of dense linears and of heads outside the layers' packed ones, which are torch's.
"""

import atexit
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qerl_compile.kernels.rehearsal_script import Attention, Linear, Script
from qerl_compile.passes.adapt import padded_rank
from qerl_compile.plan import Plan

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What a rehearsal did.

    Attributes:
        forms: kernels compiled, or found compiled.
        seconds: from the start of its process to its end.
        failures: one line each.
    """

    forms: int
    seconds: float
    failures: tuple[str, ...]


def rehearse(
    model: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    decode_rows: Sequence[int],
    prefill_tokens: Sequence[int],
    training_tokens: Sequence[int],
    positions: int,
    page_tokens: int,
    processes: int | None = None,
) -> "Rehearsal | None":
    """Start compiling; return at once.

    Args:
        model: a Hugging Face causal LM that `plan` was made for, its weights on any device, meta included.
        plan: which linears are packed.
        device: where the model will run.
        decode_rows: batch sizes of decode steps.
        prefill_tokens: numbers of tokens of prefills; one for each bucket of dispatch.py that may come.
        training_tokens: the same of micro-batches.
        positions: most of a sequence, prompt and completion.
        page_tokens: positions of a page of the cache.
        processes: None for one a core, but two.

    Returns:
        A handle, or None where nothing is to be compiled: no CUDA device, nothing packed, or activations that are not
        bfloat16, which no kernel of ours takes. None too, with a warning, if the system gives no further process.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    script = script_for(
        model,
        plan,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        decode_rows=decode_rows,
        prefill_tokens=prefill_tokens,
        training_tokens=training_tokens,
        positions=positions,
        page_tokens=page_tokens,
        processes=max(1, cores() - 2) if processes is None else processes,
    )
    if script is None:
        return None
    _set_cache_directory(0 if device.index is None else device.index)
    try:
        rehearsal = Rehearsal(script)
    except OSError as fault:
        log.warning("kernels are not compiled ahead, because no process could be started: %s", fault)
        return None
    importlib.import_module("torch._inductor.compile_fx")  # its workers start
    return rehearsal


def script_for(
    model: nn.Module,
    plan: Plan,
    *,
    capability: tuple[int, int],
    multiprocessors: int,
    decode_rows: Sequence[int],
    prefill_tokens: Sequence[int],
    training_tokens: Sequence[int],
    positions: int,
    page_tokens: int,
    processes: int,
) -> Script | None:
    """Return what a run of this model will launch on such a device, or None if nothing of ours; see `rehearse`."""
    linears = packed_linears(model, plan)
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    if not linears or embedding.weight.dtype != torch.bfloat16:
        return None
    return Script(
        capability=capability,
        multiprocessors=multiprocessors,
        linears=linears,
        attention=_attention(model, plan, positions, page_tokens),
        decode_rows=tuple(decode_rows),
        prefill_tokens=tuple(prefill_tokens),
        training_tokens=tuple(training_tokens),
        processes=processes,
    )


def packed_linears(model: nn.Module, plan: Plan) -> tuple[Linear, ...]:
    """Return the shapes of a model's packed products, each once, in the order in which a layer meets them."""
    last = {_last(plan, layer) for layer in plan.layers}
    found: dict[Linear, None] = {}
    for path in plan.quantize:
        group = plan.group_of(path)
        if path != group[0]:
            continue
        weights = [_weight(model, member) for member in group]
        ranks = sum(plan.lora[member].rank for member in group if member in plan.lora)
        rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        rank = padded_rank(ranks) if ranks else 0
        found.setdefault(Linear(rows, columns, rank, residual=bool(rank) and path in last and group == (path,)))
    return tuple(found)


def _last(plan: Plan, layer: str) -> str | None:
    """Return the last packed linear of a layer: the one whose result ends it (passes/residual.py)."""
    inside = [path for path in plan.quantize if path.startswith(f"{layer}.")]
    return inside[-1] if inside else None


def _weight(model: nn.Module, path: str) -> torch.Tensor:
    weight: Any = model.get_submodule(path).weight
    return weight


def _attention(model: nn.Module, plan: Plan, positions: int, page_tokens: int) -> Attention | None:
    """Return the attention of a layer whose q, k and v are one packed product; None if there is no such layer."""
    config: Any = model.config
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # a config of another kind, or with a number for each layer
        return None
    heads_kv = getattr(config, "num_key_value_heads", None) or heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    for group in plan.groups:
        if sum(_weight(model, path).shape[0] for path in group) == (heads + 2 * heads_kv) * d:
            bias = getattr(model.get_submodule(group[0]), "bias", None) is not None
            pages = -(-positions // (4 * page_tokens)) * 4  # of a table's row (rl/rollout/paged.py)
            windows = {getattr(module, "sliding_window", None) or 0 for module in _attentions(model, plan)}
            return Attention(heads, heads_kv, d, page_tokens, pages, bias, tuple(sorted(windows)) or (0,))
    return None


def _attentions(model: nn.Module, plan: Plan) -> list[nn.Module]:
    modules = [module for layer in plan.layers for module in model.get_submodule(layer).modules()]
    return [module for module in modules if hasattr(module, "layer_idx")]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _set_cache_directory(device_index: int) -> None:
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device_index))


class Rehearsal:
    """A process that compiles a script's kernels.

    Args:
        script: what will be launched.
        command: the process, which reads the script; for tests.
    """

    def __init__(
        self, script: Script, command: Sequence[str] = (sys.executable, "-P", "-m", "qerl_compile.kernels.rehearsal")
    ) -> None:  # -P: no module is taken from the working directory
        root = str(Path(__file__).parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        self.outcome: Outcome | None = None
        self._failures: list[str] = []
        self._total: dict[str, Any] = {}
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, one of our own modules
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",  # compilers quote what they like
            env=environment,
            start_new_session=True,  # a group of its own: `stop` reaches the processes that it forks
        )
        atexit.register(self.stop)
        self._reader = threading.Thread(target=self._read, args=(script.to_json(),), daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Return what was done, once it is done; None if the time ran out before."""
        self._reader.join(timeout_s)
        return self.outcome

    def stop(self) -> None:
        """End the process and those that it forked, if they still run."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._process.pid, signal.SIGTERM)

    def _read(self, script: str) -> None:
        process, said = self._process, ""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process was started with pipes")
        try:
            process.stdin.write(script + "\n")
            process.stdin.close()
        except BrokenPipeError:  # it has ended already; what it said is read below
            said = "it read no script"
        for line in process.stdout:
            if not self._take(line):
                said = line.strip() or said
        code = process.wait()
        if not self._total:
            self._failures.append(f"the process ended with code {code}: {said}")
        self.outcome = Outcome(self._total.get("forms", 0), self._total.get("seconds", 0.0), tuple(self._failures))
        if self._failures and code >= 0:  # below 0 it was stopped, by us or by somebody who knows
            log.warning(
                "kernels that could not be compiled ahead, and will be at their first launch: %s",
                "; ".join(self._failures[:3]),
            )

    def _take(self, line: str) -> bool:
        """Take a line if it is a result; compilers print to the same pipe, braces included."""
        try:
            result = json.loads(line)
        except ValueError:
            return False
        match result:
            case {"forms": int(), "seconds": float()}:
                self._total = result
            case {"kernel": str(), "error": str() | None}:
                if result["error"]:
                    self._failures.append(f"{result['kernel']}: {result['error']}")
            case _:
                return False
        return True
