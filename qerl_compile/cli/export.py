"""`qerl-compile export RUN|DIR --target vllm -o OUT`: files that a serving engine loads."""

from typing import Annotated

import typer

from qerl_compile.cli.options import Device, Model, Out

Target = Annotated[str, typer.Option(help="vllm or sglang (NVFP4 weights), peft (adapter).")]


def export(model: Model, out: Out, target: Target, device: Device = None) -> None:
    """Write a training run, or a model directory, for another program."""
    from qerl_compile.cli.console import quiet_libraries, wrote
    from qerl_compile.staged_write import refuse_existing

    quiet_libraries()
    refuse_existing(out)
    from qerl_compile.cli.runs import is_run, open_model
    from qerl_compile.exporters import check_target
    from qerl_compile.exporters import export as write

    check_target(target)
    policy, tokenizer, name = open_model(model, inner="eager", device=device)
    write(policy, out, target=target, tokenizer=tokenizer, base_name=name)
    if target == "peft":
        wrote(out, "PEFT adapter", then=f"vllm serve {name} --enable-lora --lora-modules trained={out}")
    elif is_run(model):
        then = f"vllm serve {out} --enable-lora --lora-modules trained={model}/adapter"
        wrote(out, "NVFP4A16 base weights; the adapter stays separate", then=then)
    else:
        wrote(out, "NVFP4A16 checkpoint", then=f"vllm serve {out}")
