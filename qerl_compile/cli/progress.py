"""One progress line for a training run, and one permanent line per evaluation and per step that broke off.

The line has the signals that say whether a run learns, and fits 120 columns with the step and the time that is left.
The loss is not among them: with one update per rollout it is about 0 whatever happens.

    reward  mean over groups                    no-signal  share of groups whose rewards are all alike
    H       entropy, nats per token             |g|        norm of the gradient before clipping
    clip    share of tokens with clipped ratio  Δlogp      mismatch: mean |trainer - sampler| log-prob of a token
    len     mean completion, tokens             σ a×b      noise level × number of noisy norms
    a+b tok/s  sampled in the rollout + trained in the update

What a step did not measure is left out: without a group that has signal there is no update, and no entropy. If it is
still too long, `len` and then `clip` go.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

WIDTH = 120 - len("9999/9999 ") - len(" 1:23:45")
"""What is left of 120 columns beside the step and the remaining time."""


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that takes each row of metrics; the line is drawn on stderr."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qerl_compile.cli.console import stderr

    columns = (MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=stderr(), transient=False) as progress:
        bar = progress.add_task("loading graphs …", total=steps)

        def show(row: Mapping[str, Any]) -> None:
            if "eval/accuracy" in row:
                progress.console.print(describe_evaluation(row), highlight=False, markup=False)
            elif "update/fault" in row:
                text = f"step {row['step']:>4}  no update: {row['update/fault']}"
                progress.console.print(text, style="yellow", highlight=False, markup=False)
            elif "reward" in row:
                progress.update(bar, completed=int(row["step"]), description=describe(row))

        yield show


def describe_evaluation(row: Mapping[str, Any]) -> str:
    """Return the line of an evaluation: greedy accuracy, and avg@n and pass@k where they were measured."""
    text = f"step {row['step']:>4}  held-out accuracy {_share_with_interval(row, 'eval/accuracy')}"
    for name in row:
        if name.startswith(("eval/avg@", "eval/pass@")) and not name.endswith(("_low", "_high")):
            text += f"  {name.removeprefix('eval/')} {_share_with_interval(row, name)}"
    return f"{text}  {row['eval/time']:.1f} s"


def describe(row: Mapping[str, Any], width: int = WIDTH) -> str:
    """Return the signals of a training step as one line of at most `width` columns."""
    parts = {"reward": f"reward {short(row['reward'])}", "no-signal": f"no-signal {row['frac_reward_zero_std']:.0%}"}
    for label, name in (
        ("H", "entropy"),
        ("|g|", "grad_norm"),
        ("clip", "clip_ratio/region_mean"),
        ("Δlogp", "sampling/sampling_logp_difference/mean"),
        ("len", "completions/mean_length"),
    ):
        if name in row:
            parts[label] = f"{label} {short(row[name])}"
    if "noise/sigma" in row:
        parts["σ"] = f"σ {short(row['noise/sigma'])}×{row['noise/sites']}"
    speeds = [short(row[name]) for name in ("rollout/tokens_per_s", "update/tokens_per_s") if name in row]
    parts["speed"] = f"{'+'.join(speeds)} tok/s"
    parts["time"] = f"{row['step_time']:.0f}s" if row["step_time"] >= 100 else f"{row['step_time']:.1f}s"
    for spare in ("len", "clip"):
        if len(" ".join(parts.values())) > width:
            parts.pop(spare, None)
    return " ".join(parts.values())


def short(value: float | None) -> str:
    """A number in at most seven characters: three significant digits, thousands as k, small ones as 1.2e-5."""
    if value is None or not math.isfinite(value):
        return "none" if value is None else str(value)
    size = abs(value)
    if size != 0 and not 0.001 <= size < 999.5e6:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}" if size >= 0.1 else f"{value:.2g}"


def _share_with_interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1%} [{row[f'{name}_low']:.1%}, {row[f'{name}_high']:.1%}]"
