"""One progress line for a training run, and one permanent line per evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def training_progress(steps: int) -> Iterator[Callable[[dict[str, float | int]], None]]:
    """Yield a function that takes each row of metrics; the bar is drawn on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qerl_compile.cli.console import stderr

    columns = (
        TextColumn("train"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), transient=False) as progress:
        bar = progress.add_task("loading graphs …", total=steps)

        def show(row: dict[str, float | int]) -> None:
            if "eval/accuracy" in row:
                low, high = row["eval/accuracy_low"], row["eval/accuracy_high"]
                progress.console.print(
                    f"step {row['step']:>4}  held-out accuracy {row['eval/accuracy']:.1%} "
                    f"[{low:.1%}, {high:.1%}]  {row['eval/time']:.1f} s",
                    highlight=False,
                    markup=False,
                )
                return
            progress.update(bar, completed=int(row["step"]), description=describe(row))

        yield show


def describe(row: dict[str, float | int]) -> str:
    """Return the signals that say whether a run learns; the loss is not one of them (it is about 0 on policy)."""
    parts = [
        f"reward {row['reward']:.3f}",
        f"no-signal {row['frac_reward_zero_std']:.0%}",
        f"|g| {row['grad_norm']:.2f}",
    ]
    if "noise/sigma" in row:
        parts.append(f"σ {row['noise/sigma']:.1e}×{row['noise/sites']}")
    parts.append(f"{row['time/rollout']:.1f}+{row['time/update']:.1f} s")
    return "  ".join(parts)
