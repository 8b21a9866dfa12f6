"""One tiny dense model and what each writer makes of it; tests copy a directory before they change it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.layouts import writers
from tests.models import tiny_model


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """One layer of Qwen2 (biases on q/k/v) with sizes that fill no 128-row tile and no tile of four blocks."""
    model = tiny_model("qwen2", layers=1, dtype=torch.bfloat16, hidden_size=80, intermediate_size=144)
    directory = tmp_path_factory.mktemp("dense")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def written(tmp_path_factory, dense) -> Callable[[str], Path]:
    """Name of a layout → its directory, made once."""
    root, made = tmp_path_factory.mktemp("written"), {}
    makers = {
        "NVFP4A16": lambda out: writers.write_compressed_tensors(dense, out),
        "NVFP4": lambda out: writers.write_compressed_tensors(dense, out, inputs=True, cache=True),
        "ModelOpt W4A16_NVFP4": lambda out: writers.write_modelopt(dense, out),
        "ModelOpt NVFP4": lambda out: writers.write_modelopt(dense, out, inputs=True, cache=True),
        "torchao": lambda out: writers.write_torchao(dense, out),
    }

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = makers[name](root / name.replace(" ", "-"))
        return made[name]

    return directory


@pytest.fixture
def copied(tmp_path, written) -> Callable[[str], Path]:
    """Name of a layout → a copy that a test may damage."""
    return lambda name: Path(shutil.copytree(written(name), tmp_path / "copy"))
