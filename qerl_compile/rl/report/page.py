"""Everything about the runs as one HTML page: what is drawn, what is told, and the template that holds it.

The page needs no network and no script, and could not use them: its Content-Security-Policy allows images and styles
that are inside it and nothing else. Every value that the template writes goes through `visible` (text.py) and then
through jinja's escaping; nothing is marked safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qerl_compile.rl.finite import finite
from qerl_compile.rl.report.charts import Curve, Style, chart, style
from qerl_compile.rl.report.runs import ACCURACY, ReportedRun
from qerl_compile.rl.report.series import spread
from qerl_compile.rl.report.text import shortened, visible

SAMPLES = 8


@dataclass(frozen=True)
class Metric:
    """A chart: the metric's name in metrics.jsonl, the chart's title, the axis' unit, what to know about it."""

    name: str
    title: str
    unit: str
    caption: str = ""


METRICS = (
    Metric("reward", "Reward", "reward", "Mean over groups, in training, with noise if the recipe has it."),
    Metric(ACCURACY, "Held-out accuracy", "share", "Greedy, noise off. Bands of single runs are 95 % intervals."),
    Metric("entropy", "Entropy", "nats per token", "Of the policy that is trained, noise off."),
    Metric("noise/sigma", "Noise σ", "σ", "Standard deviation of the noise on norm weights in rollouts."),
    Metric(
        "sampling/sampling_logp_difference/mean", "Mismatch", "nats per token", "Mean |trainer − sampler| log-prob."
    ),
    Metric("sampling/sampling_logp_difference/max", "Largest mismatch", "nats", "Of one token in the step."),
    Metric(
        "frac_reward_zero_std", "Groups without signal", "share", "Groups whose rewards are all alike teach nothing."
    ),
    Metric("grad_norm", "Gradient norm", "L2 norm", "Before clipping."),
    Metric("clip_ratio/region_mean", "Clipped tokens", "share"),
    Metric("kl", "KL to the reference", "nats per token"),
    Metric("completions/mean_length", "Completion length", "tokens", "With the end token."),
    Metric("completions/clipped_ratio", "Cut-off completions", "share", "Those that reached max_new_tokens."),
    Metric("rollout/tokens_per_s", "Rollout throughput", "tokens/s"),
    Metric("update/tokens_per_s", "Update throughput", "tokens/s"),
    Metric("step_time", "Step time", "s"),
    Metric("time/rollout", "Step time: rollout", "s"),
    Metric("time/update", "Step time: update", "s"),
)


def render(runs: Sequence[ReportedRun], title: str = "qerl-compile report") -> str:
    """The whole page as HTML text that encodes to UTF-8.

    Args:
        runs: at least one, with different names; curves are overlaid in this order.
        title: heading of the page.

    Raises:
        ExportError: matplotlib is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    from qerl_compile import __version__

    groups: dict[tuple[str, str, str], list[ReportedRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    styles = {
        run.name: style(number, member)
        for number, members in enumerate(groups.values())
        for member, run in enumerate(members)
    }
    metrics = [*METRICS, *_sampled_metrics(runs)]
    charts = {metric: _chart(metric, [_run_curve(metric, run, styles[run.name]) for run in runs]) for metric in metrics}
    several = any(len(members) > 1 for members in groups.values())
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=visible)
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        version=__version__,
        runs=[_run_facts(run, styles[run.name]) for run in runs],
        groups=[_group_facts(key, members, number) for number, (key, members) in enumerate(groups.items())] * several,
        group_charts=[drawn for metric in metrics if (drawn := _group_chart(metric, list(groups.values())))] * several,
        charts=[drawn for drawn in charts.values() if drawn],
        absent=[metric.title for metric, drawn in charts.items() if not drawn],
    )


def _sampled_metrics(runs: Sequence[ReportedRun]) -> list[Metric]:
    """avg@n and pass@k, for whichever n and k the runs have measured."""
    names = dict.fromkeys(
        name
        for run in runs
        for row in run.rows
        for name in row
        if name.startswith(("eval/avg@", "eval/pass@")) and not name.endswith(("_low", "_high"))
    )
    about = "Sampled, noise off. Bands of single runs are 95 % intervals."
    return [Metric(name, f"Held-out {name.removeprefix('eval/')}", "share", about) for name in names]


def _run_curve(metric: Metric, run: ReportedRun, look: Style) -> Curve:
    line = run.points(metric.name)
    if not metric.name.startswith("eval/"):
        return Curve(run.name, line, look, smooth=metric.name != "noise/sigma")
    low, high = run.points(f"{metric.name}_low"), run.points(f"{metric.name}_high")
    return Curve(run.name, line, look, low, high, marks=True)


def _group_chart(metric: Metric, groups: Sequence[Sequence[ReportedRun]]) -> dict[str, str] | None:
    curves = []
    for number, members in enumerate(groups):
        lines = [line for run in members if (line := run.points(metric.name))]
        if not lines:
            continue
        over = spread(lines)
        label = f"{members[0].recipe_name}, mean of {len(lines)}"
        curves.append(
            Curve(label, over.mean, style(number), over.low, over.high, marks=metric.name.startswith("eval/"))
        )
    return _chart(metric, curves)


def _chart(metric: Metric, curves: Sequence[Curve]) -> dict[str, str] | None:
    drawable = [curve for curve in curves if curve.line]
    if not drawable:
        return None
    return {"title": metric.title, "caption": metric.caption, **chart(drawable, metric.unit)}


def _run_facts(run: ReportedRun, look: Style) -> dict[str, Any]:
    accuracies = run.accuracies
    shown = [accuracies[0], accuracies[-1]] if len(accuracies) > 1 else accuracies
    memory = run.peak_memory
    steps, samples = _samples(run)
    return {
        "name": run.name,
        "style": look,
        "recipe": run.recipe_name,
        "model": run.model,
        "task": run.task,
        "seed": _or_dash(run.seed),
        "steps": f"{run.steps} of {run.planned_steps}" if run.planned_steps else run.steps,
        "accuracy": " → ".join(_percent(each.value, each.low, each.high) for each in shown) or "–",
        "step_time": _or_dash(run.median("step_time"), "{:.2f}"),
        "speed": _or_dash(run.median("rollout/tokens_per_s"), "{:,.0f}"),
        "memory": "–" if memory is None else f"{memory[1] / 1024:.1f} GiB ({memory[0]})",
        "notes": run.notes,
        "sample_steps": steps,
        "samples": samples,
    }


def _group_facts(key: tuple[str, str, str], members: Sequence[ReportedRun], number: int) -> dict[str, Any]:
    last = [run.accuracies[-1].value for run in members if run.accuracies]
    times = [time for run in members if (time := run.median("step_time")) is not None]
    return {
        "recipe": key[0],
        "model": key[1],
        "task": key[2],
        "count": len(members),
        "seeds": ", ".join(str(_or_dash(run.seed)) for run in members),
        "accuracy": _percent(sum(last) / len(last), min(last), max(last)) if last else "–",
        "step_time": f"{min(times):.2f} to {max(times):.2f}" if times else "–",
        "style": style(number),
        "differences": _differences(members),
    }


def _differences(members: Sequence[ReportedRun]) -> str:
    """Recipe keys, other than the seed, in which the members are not alike, with their values."""
    flat = [_flat(run.recipe.model_dump(mode="json")) for run in members if run.recipe is not None]
    keys = sorted({key for each in flat for key in each} - {"train.seed"})
    texts = []
    for key in keys:
        values = list(dict.fromkeys(str(each.get(key, "absent")) for each in flat))
        if len(values) > 1:
            texts.append(f"{key} is {' or '.join(values)}")
    return ", ".join(texts)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    parts = (_flat(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


def _samples(run: ReportedRun) -> tuple[list[int], list[dict[str, Any]]]:
    """Steps of the first and last evaluation with samples, and a row per prompt with the answers at those steps."""
    steps = sorted({row["step"] for row in run.samples})
    steps = [steps[0], steps[-1]] if len(steps) > 1 else steps
    prompts: dict[str, dict[int, dict[str, str]]] = {}
    for row in run.samples:
        if row["step"] in steps:
            prompts.setdefault(str(row.get("prompt", "")), {})[row["step"]] = _answer(row)
    rows = (
        {"prompt": shortened(prompt), "answers": [answers.get(step) for step in steps]}
        for prompt, answers in prompts.items()
    )
    return steps, list(islice(rows, SAMPLES))


def _answer(row: dict[str, Any]) -> dict[str, str]:
    reward = finite(row.get("reward"))
    if reward is not None:
        told = {"verdict": "right" if reward > 0 else "wrong", "reward": f"reward {reward:g}"}
    else:
        told = {"verdict": "wrong", "reward": "no reward: the judge failed"}
    return {"text": shortened(row["completion"]), **told}


def _percent(value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.1f} %{interval}"


def _or_dash(value: float | None, form: str = "{}") -> str:
    return "–" if value is None else form.format(value)
