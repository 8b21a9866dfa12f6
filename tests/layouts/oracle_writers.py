"""Compare the checkpoints that writers.py makes with what llm-compressor and ModelOpt make of the same model.

    python3 -m venv /opt/llmc && /opt/llmc/bin/pip install torch==2.13.0 && \\
        /opt/llmc/bin/pip install torch==2.13.0 'llmcompressor==0.14.*'
    python3 -m venv /opt/mo && /opt/mo/bin/pip install torch==2.13.0 && \\
        /opt/mo/bin/pip install torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.23.0 accelerate datasets requests
    python -m tests.layouts.oracle_writers --llmc /opt/llmc/bin/python --modelopt /opt/mo/bin/python

Each library runs in its own environment, because their dependencies disagree with ours. For each of their formats it
compares names, dtypes, shapes and bytes of all tensors, and loads the library's directory with `qerl_compile.load`,
where every weight must be what independent.py decodes. It exits with 1 on a difference, but for calibrated scales,
which writers.py makes up. Not in CI, which has neither library.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.loading import load
from qerl_compile.passes.quantize import packed_of
from tests.layouts import writers
from tests.layouts.independent import decoded, raw_tensors
from tests.models import tiny_model

CALIBRATED = ("input_global_scale", "input_scale", "k_scale", "v_scale")
LLMC = """
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
source, out, inputs, cache = sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
rows = [{"input_ids": [(7 * i + j) % 128 for j in range(24)], "attention_mask": [1] * 24} for i in range(4)]
text = dict(dataset=Dataset.from_list(rows), num_calibration_samples=4, max_seq_length=24) if inputs else {}
kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True} if cache else None
scheme = "NVFP4" if inputs else "NVFP4A16"
recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], kv_cache_scheme=kv)
oneshot(model=model, recipe=recipe, **text)
model.save_pretrained(out, save_compressed=True)
"""
MODELOPT = """
import copy, sys, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
source, out, inputs, cache = sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG if inputs else mtq.W4A16_NVFP4_CFG)
if cache:
    config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
mtq.quantize(model, config, lambda each: each(torch.arange(48).reshape(2, 24)))
export_hf_checkpoint(model, export_dir=out)
"""
CASES = [(False, False), (True, False), (True, True)]
"""Quantized inputs, FP8 cache."""


def main() -> int:
    """Run the libraries that were named; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmc", help="python with llm-compressor")
    parser.add_argument("--modelopt", help="python with ModelOpt")
    given = parser.parse_args()
    jobs = [
        ("llm-compressor", given.llmc, LLMC, writers.write_compressed_tensors),
        ("ModelOpt", given.modelopt, MODELOPT, writers.write_modelopt),
    ]
    differences = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        tiny_model("qwen2", layers=1, dtype=torch.bfloat16).save_pretrained(root / "dense")
        for library, python, program, write in jobs:
            for inputs, cache in CASES if python else []:
                theirs, ours = root / f"{library}-{inputs}-{cache}", root / f"ours-{library}-{inputs}-{cache}"
                arguments = [python, "-c", program, root / "dense", theirs, str(inputs), str(cache)]
                subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, cwd=root)
                found = faults(theirs, write(root / "dense", ours, inputs=inputs, cache=cache))
                differences += len(found)
                sys.stdout.write(f"{library}, inputs {inputs}, cache {cache}: {found or 'equal'}\n")
    return int(differences > 0)


def faults(theirs: Path, ours: Path) -> list[str]:
    """Name the tensors that differ, and the modules that `load` decodes to other numbers than independent.py."""
    left, right = (raw_tensors(directory / "model.safetensors")[0] for directory in (theirs, ours))
    found = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        alike = (left[name].shape, left[name].dtype) == (right[name].shape, right[name].dtype)
        if not alike or not (name.endswith(CALIBRATED) or np.array_equal(left[name], right[name])):
            found.append(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(theirs, inner="eager", device="cpu")
    for path, weight in decoded(theirs).items():
        packed = packed_of(model.get_submodule(path))
        if packed is None or not np.array_equal(dequantize(packed, torch.float32).numpy(), weight):
            found.append(path)
    return found


if __name__ == "__main__":
    sys.exit(main())
