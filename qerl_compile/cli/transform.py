"""`qerl-compile transform MODEL -o DIR`: a packed directory that loads in seconds and that vLLM serves."""

from qerl_compile.cli.options import Device, Model, Out, RecipeName, Sets, TrustRemoteCode


def transform(
    model: Model,
    out: Out,
    recipe: RecipeName = "qerl-nvfp4-aqn",
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model to NVFP4 and write the packed checkpoint."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote
    from qerl_compile.staged_write import refuse_existing

    quiet_libraries()
    refuse_existing(out)
    from transformers import AutoTokenizer

    from qerl_compile.exporters import export
    from qerl_compile.loading import load, model_directory
    from qerl_compile.recipe import Recipe

    rules = Recipe.resolve(recipe).with_overrides(set_)
    packed = load(model, rules, device=device, trust_remote_code=trust_remote_code)
    plan = packed.qerl.plan
    stdout().print(
        f"{type(packed).__name__}: {len(plan.quantize)} linears to NVFP4 in {len(plan.layers)} layers, "
        f"{len(plan.groups)} fused groups; the recipe adds {len(plan.lora)} adapters and {len(plan.noise)} noisy norms"
    )
    export(packed, out, target="vllm", tokenizer=AutoTokenizer.from_pretrained(model_directory(model)), base_name=model)
    wrote(out, "NVFP4A16 checkpoint", then=f"qerl-compile train {out} --recipe {recipe} --task rg:chain_sum -o RUN")
