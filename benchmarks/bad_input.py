"""Bad input, case by case, and the exact message each gets.

    python benchmarks/bad_input.py          prints the table and writes benchmarks/results/bad_input.md

A case is one function that must raise a `QerlError`; to add one, write it below `@case(area, "what is wrong")`. It is
given an empty folder. The script fails if a case raises anything else, or nothing. Hostile directories come from
tests/attacks, where there are many more; here is one of each kind.
"""

# ruff: noqa: E402  # a script: it finds its neighbours before it imports them
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub id that does not exist must fail the same way everywhere

import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qerl_compile.backend import qerl
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import QerlError
from qerl_compile.loading import load
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.attacks import directories, headers, indexes  # noqa: F401  # importing registers their attacks
from tests.attacks.making import ATTACKS

PROJECTIONS = r"(.*\.)?layers\.\d+\.(.*\.)?\w+_proj"


@dataclass(frozen=True)
class Case:
    """A piece of bad input."""

    area: str
    wrong: str
    run: Callable[[Path], object]


CASES: list[Case] = []


def case(area: str, wrong: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Add a function to the table."""

    def add(run: Callable[[Path], object]) -> Callable[[Path], object]:
        CASES.append(Case(area, wrong, run))
        return run

    return add


# --- recipes --------------------------------------------------------------------------------------

for wrong, text in {
    "misspelt key": "quantise: []",
    "misspelt key in a rule": "quantize: [{mach: .*}]",
    "unknown number format": "quantize: [{match: .*, format: nvpf4}]",
    "number in quotation marks": "lora: [{match: .*, rank: '32'}]",
    "invalid regular expression": "quantize: [{match: '(.*'}]",
    "regular expression that could run for minutes": "quantize: [{match: '(\\w+\\.?)+x'}]",
    "noise that grows": "noise: {sigma_start: 1e-4, sigma_end: 1e-2}",
    "a key twice": "name: a\nname: b",
    "an object tag": "name: !!python/object/apply:os.system [id]",
    "a newer version": "version: 2",
}.items():

    @case("recipe", wrong)
    def _file(folder: Path, text: str = text) -> object:
        version = "" if text.startswith("version") else "version: 1\n"
        (folder / "recipe.yaml").write_text(f"{version}{text}\n")
        return Recipe.from_file(folder / "recipe.yaml")


@case("recipe", "misspelt built-in name")
def _name(_: Path) -> object:
    return Recipe.resolve("qerl-nvpf4-aqn")


@case("recipe", "misspelt override")
def _override(_: Path) -> object:
    return Recipe.named("nvfp4-lora").with_overrides(["train.learning_rat=2e-4"])


@case("recipe", "override out of bounds")
def _bounds(_: Path) -> object:
    return Recipe.named("nvfp4-lora").with_overrides(["train.group_size=1"])


# --- model directories ----------------------------------------------------------------------------

for attack, wrong in {
    "no_config": "config.json is missing",
    "config_maps_classes_to_code": "auto_map in config.json",
    "config_names_a_kernel_on_the_hub": "config.json names a hub kernel",
    "a_python_file": "a Python file",
    "a_pickle_of_weights": "a pickle",
    "the_shard_is_a_link_to_outside": "a shard that links outside",
    "a_shard_in_the_folder_above": "an index that leads to ../",
    "a_missing_shard": "a missing shard",
    "truncated_data": "a truncated shard",
    "trailing_bytes": "bytes behind the last tensor",
    "an_overlap": "two tensors that overlap",
    "a_dtype_below_one_byte": "an unknown dtype",
    "a_name_that_climbs": "a tensor called ../../etc/passwd",
    "more_tensors_than_anybody_needs": "a header made to fill memory",
    "a_tensor_that_is_listed_but_absent": "index and shards that disagree",
    "a_git_lfs_pointer": "a Git LFS pointer",
}.items():

    @case("directory", wrong)
    def _directory(folder: Path, attack: str = attack) -> object:
        return open_checkpoint(ATTACKS[attack].build(folder))


@case("directory", "a hub id that is not there, offline")
def _hub(_: Path) -> object:
    return load("some-org/no-such-model", "nvfp4-lora")


# --- tensors and models ---------------------------------------------------------------------------


def tiny(hidden_size: int = 32, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """A Llama of one layer with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).to(dtype)


def saved(folder: Path, model: PreTrainedModel) -> Path:
    """The model as a directory."""
    model.save_pretrained(folder / "model")
    return folder / "model"


@case("tensors", "NaN in a weight, from a directory")
def _nan_on_disk(folder: Path) -> object:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    return load(saved(folder, model), "nvfp4-lora", inner="eager")


@case("tensors", "Inf in a weight, in memory")
def _inf_in_memory(_: Path) -> object:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("inf")
    return transform(model, "nvfp4-lora", inner="eager")


@case("tensors", "a tensor that the model needs is missing")
def _missing(folder: Path) -> object:
    model = tiny()
    state = {name: value for name, value in model.state_dict().items() if "q_proj" not in name}
    model.save_pretrained(folder / "model", state_dict=state)
    return load(folder / "model", "nvfp4-lora", inner="eager")


@case("tensors", "a tensor that the model does not have")
def _extra(folder: Path) -> object:
    model = tiny()
    state = model.state_dict() | {"model.layers.0.mlp.up_porj.weight": torch.zeros(2, 2)}
    model.save_pretrained(folder / "model", state_dict=state)
    return load(folder / "model", "nvfp4-lora", inner="eager")


@case("tensors", "a config of another size")
def _other_size(folder: Path) -> object:
    root = saved(folder, tiny())
    config = root / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 128'))
    return load(root, "nvfp4-lora", inner="eager")


@case("tensors", "K is no multiple of 16")
def _k(_: Path) -> object:
    return transform(tiny(hidden_size=40), "nvfp4-lora", inner="eager")


@case("tensors", "weights in fp64")
def _dtype(_: Path) -> object:
    return transform(tiny(dtype=torch.float64), "nvfp4-lora", inner="eager")


@case("model", "a rule that matches nothing")
def _unused(_: Path) -> object:
    return transform(tiny(), {"quantize": [{"match": r"transformer\.h\.\d+\.\w+"}]}, inner="eager")


@case("model", "noise on norms that are not eligible")
def _norms(_: Path) -> object:
    return transform(tiny(), {"noise": {"match": r"model\.norm"}}, inner="eager")


@case("model", "a model that was transformed before")
def _twice(_: Path) -> object:
    return transform(transform(tiny(), "nvfp4-lora", inner="eager"), "nvfp4-lora", inner="eager")


@case("model", "casting packed weights")
def _cast(_: Path) -> object:
    return transform(tiny(), "nvfp4-lora", inner="eager").half()


@case("model", "an unknown inner compiler")
def _inner(_: Path) -> object:
    return transform(tiny(), "nvfp4-lora", inner="indcutor")


@case("model", "LoRA asked of the bare backend")
def _backend(_: Path) -> object:
    compiled = torch.compile(tiny(), backend=qerl, options={"recipe": "nvfp4-lora", "inner": "eager"})
    try:
        return compiled(torch.zeros(1, 2, dtype=torch.long))
    except BackendCompilerFailed as wrapped:  # Dynamo wraps what a backend raises, and prints it in full
        raise wrapped.inner_exception from wrapped


def message_of(each: Case) -> tuple[str, bool]:
    """The message a case gets, with its folder written as DIR, and whether it is one of ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            each.run(folder)
        except QerlError as error:
            kind = type(error).__name__
            return f"{kind}: {error}".replace(name, "DIR"), True
        except Exception as error:
            return f"NOT OURS {type(error).__name__}: {error}".replace(name, "DIR"), False
    return "ACCEPTED", False


def main() -> int:
    """Run every case; 1 if one of them did not get a message of ours."""
    torch.set_num_threads(1)
    rows = [(each, *message_of(each)) for each in CASES]
    good = sum(is_ours for *_, is_ours in rows)
    lines = [
        "# Bad input and the message it gets",
        "",
        f"Written by `python benchmarks/bad_input.py`. {good} of {len(rows)} cases end in one of our errors, which say",
        "where, what was expected, what was got, and what to do. DIR is the case's folder.",
        "",
        "| | what is wrong | message |",
        "|---|---|---|",
    ]
    for each, message, _ in rows:
        print(f"[{each.area}] {each.wrong}\n    {message}\n")
        cell = message.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {each.area} | {each.wrong} | {cell} |")
    out = REPOSITORY / "benchmarks" / "results" / "bad_input.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(f"{good} of {len(rows)} cases got a message of ours; table in {out.relative_to(REPOSITORY)}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
