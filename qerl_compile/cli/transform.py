"""`qerl-compile transform MODEL -o DIR`: a packed directory that loads in seconds and that vLLM serves.

Load or calibrate, then export with the target vllm: the same code as `export` after a run. What can be refused is,
before weights are read: an output that exists, a recipe that packs nothing, sample text that the recipe would not read.
The adapters and noisy norms of the recipe are counted on screen and not written, for they are what training adds.

What it does not do: measure what rounding cost. `export --verify` does.
"""

from typing import TYPE_CHECKING

from qerl_compile.cli.calibrating import CalibrateOn
from qerl_compile.cli.options import Device, Model, Out, RecipeName, Sets, TrustRemoteCode

if TYPE_CHECKING:
    from qerl_compile.plan import Plan


def transform(
    model: Model,
    out: Out,
    recipe: RecipeName = "qerl-nvfp4-aqn",
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    calibrate_on: CalibrateOn = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model to NVFP4 and write the packed checkpoint."""
    from qerl_compile.cli.calibrating import calibration_texts, export_options, refuse_unread, summary
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote
    from qerl_compile.cli.runs import base_name, open_tokenizer, refuse_output

    quiet_libraries()
    refuse_output(out)
    from qerl_compile.calibrating import calibrate
    from qerl_compile.cli.hints import train_command
    from qerl_compile.errors import RecipeError
    from qerl_compile.exporters import export
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe

    rules = Recipe.resolve(recipe).with_overrides(set_)
    if not rules.quantize:
        raise RecipeError(
            where=f"recipe {rules.name}: quantize",
            expected="at least one rule, since packed weights are what transform writes",
            got="none",
            do="Use --recipe nvfp4-lora, or train MODEL itself with this recipe.",
        )
    if calibrate_on is not None:
        refuse_unread(rules)
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    options = {"inner": "eager", "device": device, "trust_remote_code": trust_remote_code}
    if calibrate_on is None:
        packed = load(model, rules, **options)
    else:
        texts, reports = calibration_texts(calibrate_on, tokenizer), []
        packed = calibrate(model, rules, texts, tokenizer=tokenizer, listen=reports.append, **options)
        stdout().print(summary(reports))
    plan = packed.qerl.plan
    experts = plan.places()
    count = len(plan.quantize) + len(plan.trained_weights) + len(experts)
    of_experts = f" ({len(experts)} of experts)" if experts else ""
    groups = len(plan.groups) + len(plan.trained_groups)
    stdout().print(
        f"{type(packed).__name__}: {count} linears{of_experts} to NVFP4 in {len(plan.layers)} layers, "
        f"{groups} fused groups; in training the recipe adds {len(plan.lora)} adapters "
        f"and {len(plan.noise)} noisy norms"
    )
    scales = export_options(packed)
    export(packed, out, target="vllm", tokenizer=tokenizer, base_name=base_name(model), **scales)
    then = train_command(out) if plan.trained_weights else train_command(out, recipe, [*set_, *_met(plan)])
    wrote(out, f"NVFP4{'' if 'activations' in scales else 'A16'} checkpoint", then=then)


def _met(plan: "Plan") -> list[str]:
    """Return the overrides without rules that a packed checkpoint has met already and that would be refused on it."""
    return ["sparsify=[]"] if plan.sparse else []
