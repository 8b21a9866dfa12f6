"""`qerl-compile export RUN|DIR --target vllm -o OUT`: files that another program loads.

    qerl-compile export RUN --target vllm -o OUT                          the packed base; the adapter stays a file
    qerl-compile export RUN --target tensorrt-llm --verify -o OUT         the same in ModelOpt's format, measured
    qerl-compile export RUN --target vllm --merge dequantized -o OUT      the adapter inside, as a bf16 model
    qerl-compile export DIR --target onnx --runtime onnxruntime -o OUT    one graph

A merge is always measured against the model with its adapter on, and so is what `--verify` writes: a table on the
card, a page, and a refusal over budget (exporters/verify).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qerl_compile.cli.options import Device, ModelOrRun, Out

if TYPE_CHECKING:
    from qerl_compile.exporters.verify import Verification

Target = Annotated[
    str,
    typer.Option(help="vllm, sglang, tensorrt-llm, transformers (NVFP4 weights), onnx, or peft (the adapter alone)."),
]
NormsInBase = Annotated[
    bool, typer.Option("--norms-in-base", help="Write trained norms into the base; its adapter then has none.")
]
Format = Annotated[str | None, typer.Option("--format", help="vllm, sglang: compressed-tensors (default) or modelopt.")]
Activations = Annotated[
    str | None, typer.Option(help="16 (default), or 4 for a model calibrated with calibration.activations.")
]
KVCache = Annotated[
    str | None, typer.Option("--kv-cache", help="16 (default), or 8 for a model calibrated with kv_cache: fp8.")
]
Runtime = Annotated[str | None, typer.Option(help="onnx: standard (default) or onnxruntime.")]
Adapter = Annotated[str | None, typer.Option(help="onnx: kept (default, as branches) or folded into dense weights.")]
Merge = Annotated[
    str, typer.Option(help="Merge the adapter: dequantized, bf16-master, or nvfp4. The default leaves it out.")
]
Base = Annotated[str | None, typer.Option(help="The bf16 base, for --merge bf16-master and to measure against.")]
Verify = Annotated[bool, typer.Option("--verify", help="Load it back, measure it, and refuse it over budget.")]
Text = Annotated[
    Path | None, typer.Option(help="Text to measure on, plain or JSONL; default: 6 kB that come with the package.")
]
Budget = Annotated[
    list[str], typer.Option(metavar="NAME=NUMBER", help="Change a budget, as merge_kl=0.1 or sqnr_db=10; repeatable.")
]
KeepFailing = Annotated[bool, typer.Option("--keep-failing", help="Publish over budget too; its card says so.")]


def export(
    model: ModelOrRun,
    out: Out,
    target: Target,
    norms_in_base: NormsInBase = False,
    format_: Format = None,
    activations: Activations = None,
    kv_cache: KVCache = None,
    runtime: Runtime = None,
    adapter: Adapter = None,
    merge: Merge = "",
    base: Base = None,
    verify: Verify = False,
    text: Text = None,
    budget: Budget = [],  # noqa: B006  # typer wants a list literal
    keep_failing: KeepFailing = False,
    device: Device = None,
) -> None:
    """Write a training run, or a model directory, for another program."""
    from qerl_compile.cli.console import quiet_libraries
    from qerl_compile.cli.runs import open_model, refuse_output
    from qerl_compile.exporters import check_target

    quiet_libraries()
    choices = {"format": format_, "activations": activations, "kv_cache": kv_cache, "runtime": runtime}
    options: dict[str, Any] = {
        name: value for name, value in {**choices, "adapter": adapter}.items() if value is not None
    }
    check_target(target, **options)
    refuse_output(out)
    measured = bool(merge) or verify
    _refuse_idle(measured, text=text, budget=budget, base=base, keep_failing=keep_failing)
    from qerl_compile.exporters import export as write
    from qerl_compile.exporters.verify import check_verified, export_verified

    limits, texts = _limits(budget), _texts(text)
    if measured:
        check_verified(target, merge, options, base=base, texts=texts, budgets=limits)
    policy, tokenizer, base_name = open_model(model, inner="eager", device=device)
    shared: dict[str, Any] = {
        "target": target,
        "tokenizer": tokenizer,
        "base_name": base_name,
        "norms_in_base": norms_in_base,
    }
    if measured:
        found = export_verified(
            *(policy, out),
            **shared,
            merge=merge,
            base=base,
            texts=texts,
            text_name=text.name if text else "",
            budgets=limits,
            keep_failing=keep_failing,
            **options,
        )
        _tell_quality(found)
    else:
        write(policy, out, **shared, **options)
    _tell_end(policy, model, out, target, merge=merge, base_name=base_name, norms_in_base=norms_in_base)


def _refuse_idle(measured: bool, **given: Any) -> None:
    """Refuse options of a measurement where nothing is measured, rather than ignore them."""
    from qerl_compile.errors import ExportError

    idle = [name for name, value in given.items() if value]
    if idle and not measured:
        option = f"--{idle[0].replace('_', '-')}"
        raise ExportError(where=option, expected="it beside --verify or --merge", got="neither", do="Add --verify.")


def _limits(pairs: list[str]) -> Any:
    from dataclasses import fields, replace

    from qerl_compile.errors import ExportError
    from qerl_compile.exporters.verify import Budgets

    if not pairs:
        return None
    limits, known = Budgets(), [limit.name for limit in fields(Budgets)]
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            if name not in known:
                raise ValueError
            limits = replace(limits, **{name: float(number)})
        except ValueError:
            raise ExportError(
                where="--budget",
                expected=f"NAME=NUMBER with one of {', '.join(known)}",
                got=repr(pair),
                do="Write it as --budget merge_kl=0.1.",
            ) from None
    return limits


def _texts(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    from qerl_compile.perplexity import read_texts

    return read_texts(file)


def _tell_quality(found: "Verification") -> None:
    from rich.table import Table

    from qerl_compile.cli.console import stdout

    table = Table(box=None, pad_edge=False)
    for heading in ("measured", "value", "budget", ""):
        table.add_column(heading)
    for check in found.checks():
        verdict = "" if check.passed is None else "ok" if check.passed else "over"
        table.add_row(check.what, check.value, check.budget, verdict, style="red" if verdict == "over" else None)
    stdout().print(table)


def _tell_end(
    policy: Any, model: str, out: Path, target: str, *, merge: str, base_name: str, norms_in_base: bool
) -> None:
    from qerl_compile.adapter_files import adapters_of, trained_norms_of
    from qerl_compile.cli.console import wrote
    from qerl_compile.cli.hints import inspect_command, serve_command
    from qerl_compile.cli.runs import is_run

    engine = target.partition("==")[0]
    rank = max((adapter.rank for adapter in adapters_of(policy).values()), default=0)
    serving = serve_command(engine, out)
    if engine == "peft":
        wrote(out, "PEFT adapter", then=serve_command(engine, base_name, out, rank))
    elif engine == "onnx":
        wrote(out, "ONNX graph with its cache", then=serving)
    elif merge:
        what = "NVFP4 weights" if merge == "nvfp4" else "bf16 weights"
        wrote(out, f"{what} with the adapter merged ({merge})", then=serving)
    elif is_run(model) and trained_norms_of(policy):
        # vLLM takes no adapter with norms, so the run's own cannot be served with this base
        norms = "with" if norms_in_base else "without"
        wrote(out, f"NVFP4 base weights {norms} the trained norms", then=serving)
    elif is_run(model):
        what = "NVFP4 base weights; the adapter is not merged and stays where it is"
        takes_adapter = engine in ("vllm", "sglang")
        wrote(out, what, then=serve_command(engine, out, f"{model}/adapter", rank) if takes_adapter else serving)
    else:
        wrote(out, "NVFP4 checkpoint", then=serving if engine != "transformers" else inspect_command(out))
