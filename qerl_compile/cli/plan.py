"""`qerl-compile plan MODEL [RECIPE]`: what a run will take of a GPU, before a weight is read.

One screen: the layers and what is done to them, what each part takes in rollout and update, and both peaks beside the
GPU's size. Exit code 1 if it does not fit; the last line then names the setting, or the pair of settings, with which it
does, or says that none is enough.

Nothing of the model is read but its config and the names and shapes of its tensors, and no GPU is needed: `--gpu-gib`
asks about one that is elsewhere.
"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qerl_compile.cli.options import Model, RecipeName, Sets, TrustRemoteCode

if TYPE_CHECKING:
    from rich.table import Table

    from qerl_compile.recipe import Recipe
    from qerl_compile.rl.footprint import Footprint

DEFAULT_RECIPE = "qerl-nvfp4-aqn"

RecipeToo = Annotated[str | None, typer.Argument(metavar="RECIPE", help="The same as --recipe.", show_default=False)]
LEAST_GIB, MOST_GIB = 0.1, 1_000_000.0
PROMPT_TOKENS = 256  # assumed where nobody says


def _checked_gib(gib: float | None) -> float | None:
    if gib is not None and not LEAST_GIB <= gib <= MOST_GIB:  # nan is neither
        raise typer.BadParameter(f"expected a number of GiB from {LEAST_GIB:g} to {MOST_GIB:.0f}; got {gib:g}.")
    return gib


GpuGib = Annotated[
    float | None,
    typer.Option("--gpu-gib", help="Memory of the GPU, GiB; default: of the present one.", callback=_checked_gib),
]
PromptTokens = Annotated[
    int | None, typer.Option("--prompt-tokens", help=f"Tokens of a prompt; default: {PROMPT_TOKENS}.", min=1)
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object, in bytes.")]

PARTS = (
    "packed weights", "dense weights", "adapters", "stacked adapters", "moments", "scratch", "pages", "gradients",
    "state before", "kept activations", "backward", "optimizer step", "activations",
)  # fmt: skip


def plan(
    model: Model,
    recipe_too: RecipeToo = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    gpu_gib: GpuGib = None,
    prompt_tokens: PromptTokens = None,
    json_: Json = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Predict what training takes of a GPU, before a weight is read. Exit code 1 if it cannot fit."""
    from qerl_compile.cli.console import quiet_libraries

    quiet_libraries()
    from qerl_compile.cli.hints import train_command
    from qerl_compile.errors import RecipeError
    from qerl_compile.recipe import Recipe

    if recipe_too is not None and recipe not in (DEFAULT_RECIPE, recipe_too):
        got = f"{recipe_too!r} after the model and {recipe!r}"
        raise RecipeError(where="--recipe", expected="one recipe", got=got, do="Name one of them.")
    recipe = recipe_too or recipe
    rules, then = Recipe.resolve(recipe).with_overrides(set_), train_command(model, recipe, set_)
    found = show_plan(
        model,
        rules,
        then=f"{then} --trust-remote-code" if trust_remote_code else then,
        gpu_gib=gpu_gib,
        prompt_tokens=prompt_tokens,
        json_=json_,
        trust_remote_code=trust_remote_code,
    )
    raise typer.Exit(found)


def show_plan(
    model: str,
    rules: "Recipe",
    *,
    then: str,
    gpu_gib: float | None = None,
    prompt_tokens: int | None = None,
    adapter: str | None = None,
    json_: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Print the prediction; return the exit code: 0 if it fits, or nobody said into what, else 1.

    Args:
        model: as for `load`.
        rules: the recipe.
        then: the command to go on with; not printed where weights are missing.
        gpu_gib: memory of the GPU; None for the present one.
        prompt_tokens: tokens of a prompt; None for an assumption.
        adapter: as for `load`.
        json_: one JSON object in bytes in place of tables.
        trust_remote_code: as for `load`.

    Raises:
        RecipeError, FormatError, GraphError, CheckpointError: as `load`.
        ModelError: prompt and completion are longer than the model's positions.
    """
    from qerl_compile.cli.console import stdout, tell_error, wrote_nothing
    from qerl_compile.errors import ModelError
    from qerl_compile.rl.footprint import Predictor
    from qerl_compile.rl.footprint.fitting import refuse_too_large
    from qerl_compile.rl.rollout.positions import check_positions

    device_bytes = None if gpu_gib is None else int(gpu_gib * 2**30)
    predictor = Predictor(model, rules, adapter=adapter, trust_remote_code=trust_remote_code)
    check_positions(predictor.skeleton.model, [range(prompt_tokens or 1)], rules.train.max_new_tokens, "plan")
    prompt_tokens = prompt_tokens or PROMPT_TOKENS
    footprint = predictor.footprint(device_bytes, prompt_tokens=prompt_tokens)
    fault = None
    try:
        refuse_too_large(predictor, footprint, prompt_tokens=prompt_tokens)
    except ModelError as refused:
        fault = refused
    if json_:
        found = as_dict(footprint, fault) | {"lacks_weights": predictor.lacks_weights}
        typer.echo(json.dumps(found, indent=2))
        return int(fault is not None)
    console = stdout()
    console.print(headline(footprint, rules, prompt_tokens), markup=False, highlight=False)
    console.print(layer_table(footprint))
    console.print(parts_table(footprint))
    if fault is not None:
        tell_error(fault)
        return 1
    if predictor.lacks_weights:
        missing = f"missing  weights: nothing loads or trains {model} before its safetensors files are there"
        console.print(f"{verdict(footprint)}; nothing was written", markup=False, highlight=False, style="dim")
        console.print(missing, markup=False, highlight=False, style="yellow")
    else:
        wrote_nothing(verdict(footprint), then=then)
    return 0


def warn_if_too_large(
    model: str,
    rules: "Recipe",
    *,
    adapter: str | None = None,
    device_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print a warning if a run will not fit, or if nothing can be predicted; without a GPU, do nothing.

    A run is not refused for a prediction: its prompts may be short, and its micro-batches are halved if need be. What
    is wrong with a model is for `load` to say.

    Args:
        model: as for `load`.
        rules: the recipe.
        adapter: as for `load`.
        device_bytes: memory of the GPU; None for the present one.
        trust_remote_code: as for `load`.
    """
    from qerl_compile.cli.console import stderr
    from qerl_compile.errors import QerlError
    from qerl_compile.rl.footprint import Predictor, present_device_bytes
    from qerl_compile.rl.footprint.fitting import refuse_too_large

    device_bytes = device_bytes or present_device_bytes()
    if device_bytes is None:
        return
    what = "not predicted whether it fits"
    try:
        predictor = Predictor(model, rules, adapter=adapter, trust_remote_code=trust_remote_code)
        footprint = predictor.footprint(device_bytes)
        what = "may not fit"
        refuse_too_large(predictor, footprint)
    except QerlError as fault:
        stderr().print(f"{what}: {fault}", style="yellow", highlight=False, markup=False)


def as_dict(footprint: "Footprint", fault: Exception | None = None) -> dict[str, Any]:
    """Return a prediction as plain values, in bytes."""
    names = ("model", "after_load", "rollout_peak", "training_peak", "training_most", "rollout", "training")
    layers = [{key: value for key, value in vars(kind).items() if key != "call"} for kind in footprint.kinds]
    return {
        **{name: getattr(footprint, name) for name in names},
        "held": asdict(footprint.held),
        "layers": layers,
        "device_bytes": footprint.device_bytes,
        "fits": None if footprint.device_bytes is None else not footprint.over,
        "fault": None if fault is None else str(fault),
    }


def headline(footprint: "Footprint", rules: "Recipe", prompt_tokens: int) -> str:
    """Say what is predicted, in one line."""
    train = rules.train
    return (
        f"{footprint.model}, recipe {rules.name}: {train.prompts_per_step} x {train.group_size} sequences of "
        f"{prompt_tokens} + {train.max_new_tokens} tokens, {train.micro_batch_tokens} tokens a micro-batch, "
        f"recompute {'on' if train.recompute else 'off'}"
    )


def layer_table(footprint: "Footprint") -> "Table":
    """Return a row for each kind of layer."""
    table = _table("layers like", "count", "packed", "adapted", "noisy", "MiB each")
    for kind in footprint.kinds:
        counts = (kind.count, kind.quantized, kind.adapted, kind.noisy)
        table.add_row(kind.first, *map(str, counts), f"{kind.held_bytes / 2**20:.1f}")
    return table


def parts_table(footprint: "Footprint") -> "Table":
    """Return a row for each part, in GiB, and the peaks."""
    table = _table("GiB", "rollout", "update")
    phases = (footprint.rollout, footprint.training)
    for name in PARTS:
        if any(name in phase for phase in phases):
            table.add_row(name, *(f"{phase[name] / 2**30:.2f}" if name in phase else "" for phase in phases))
    peaks = (footprint.rollout_peak, footprint.training_peak)
    table.add_row("peak", *(f"{peak / 2**30:.2f}" for peak in peaks), style="bold")
    if footprint.training_most > footprint.training_peak:
        table.add_row("with full micro-batches", "", f"{footprint.training_most / 2**30:.2f}")
    return table


def verdict(footprint: "Footprint") -> str:
    """Say whether it fits."""
    from qerl_compile.rl.footprint.fitting import gib

    loaded = f"{gib(footprint.after_load)} after loading, {gib(footprint.peak)} at most, in the {footprint.phase}"
    return loaded if footprint.device_bytes is None else f"{loaded}; fits {gib(footprint.device_bytes)}"


def _table(first: str, *others: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
