"""What imports cost, told by `sys.modules` and not by a clock; and that layers import one way."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    *("transformers", "peft", "accelerate", "compressed_tensors", "reasoning_gym", "matplotlib", "tensorboard"),
    *("rich", "typer", "pydantic", "yaml", "tokenizers", "safetensors", "huggingface_hub", "numpy"),
    *("torch._inductor", "triton"),
)


def modules_after(code: str) -> set[str]:
    """The names in sys.modules after `code` ran in a process of its own."""
    code += "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def of(names: set[str], packages: Iterable[str]) -> set[str]:
    return {name for name in names if any(name == package or name.startswith(f"{package}.") for package in packages)}


@pytest.fixture(scope="module")
def plain() -> set[str]:
    return modules_after("import qerl_compile")


def test_importing_the_package_loads_nothing_but_itself(plain):
    """No torch either: a name is resolved when it is first used."""
    assert of(plain, ["qerl_compile"]) == {"qerl_compile"}
    assert of(plain, (*HEAVY, "torch")) == set()


def test_the_public_names_cost_torch_and_no_model_library():
    names = modules_after("import qerl_compile as q; q.Recipe, q.load, q.transform, q.export, q.resample_noise")
    assert "torch" in names
    ours = {"pydantic", "yaml", "numpy"}  # for recipes; torch itself imports numpy
    assert of(names, set(HEAVY) - ours) == set()


def test_an_unknown_public_name_is_an_attribute_error_that_lists_the_known_ones():
    import qerl_compile

    names = "Recipe, calibrate, export, load, resample_noise, transform"
    with pytest.raises(AttributeError, match=f"'laod'; it has {names}"):
        qerl_compile.laod  # noqa: B018
    assert set(qerl_compile.__all__) - {"__version__"} == set(qerl_compile._HOMES)


def test_what_only_developers_install_is_not_needed_to_train_and_export():
    """The README's main job runs where none of these is; here they are, so they are hidden."""
    absent = ("triton", "bitsandbytes", "torchao", "trl", "onnx", "onnxscript", "matplotlib", "tensorboard")
    names = modules_after(
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import qerl_compile.loading, qerl_compile.rl.trainer, qerl_compile.rl.first_step, qerl_compile.rl.optimizer\n"
        "import qerl_compile.rl.footprint, qerl_compile.cli.train, qerl_compile.exporters.serving"
    )
    assert "qerl_compile.warm_up" in names
    assert of(names, absent) == set(absent)


COMMANDS = ("plan", "transform", "train", "eval", "report", "generate", "export", "inspect", "diff")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_exists_for_every_command_and_names_its_options(command):
    from typer.testing import CliRunner

    from qerl_compile.cli import app

    result = CliRunner().invoke(app, [command, "--help"] if command else ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert len(result.output.splitlines()) > 5


def test_help_loads_no_torch():
    code = f"""
import sys
from qerl_compile.cli import main
for command in ([], *([each] for each in {COMMANDS})):
    sys.argv = ["qerl-compile", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
"""
    needed = {"typer", "rich", "pydantic"}  # typer formats with rich, and reads defaults with pydantic
    assert of(modules_after(code), {*HEAVY, "torch"} - needed) == set()


def test_every_top_level_module_has_its_place_in_the_layers():
    """import-linter checks the order (`lint-imports`); a module that is missing from the list would not be checked."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    listed = [name.strip() for layer in contract["layers"] for name in layer.replace(":", "|").split("|")]
    package = ROOT / "qerl_compile"
    modules = {p.stem for p in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted(f"qerl_compile.{name}" for name in modules - {"__init__"})
