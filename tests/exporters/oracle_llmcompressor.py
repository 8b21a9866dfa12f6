"""Compare every byte of our NVFP4A16 export with llm-compressor's, and keep its bytes as a fixture for CI.

    python3 -m venv /opt/llmc && /opt/llmc/bin/pip install torch==2.13.0 && \\
        /opt/llmc/bin/pip install torch==2.13.0 'llmcompressor==0.14.*'
    python tests/exporters/oracle_llmcompressor.py --llmc /opt/llmc/bin/python [MODEL_DIRECTORY ...]

For the tiny models made here, and for each bf16 directory named on the command line, it runs llm-compressor's
`oneshot` round-to-nearest in its own environment (its dependencies disagree with ours) and `transform` + `export` in
this one, and compares names, dtypes, shapes and bytes of all tensors. It writes

    benchmarks/results/export_vs_llmcompressor.json   what was compared, when, with which versions
    tests/exporters/llmcompressor_nvfp4a16.json       SHA-256 of each of llm-compressor's tensors of the tiny models

and exits with 1 if a byte differs, but for one thing: llm-compressor adds 1 to the weights of norms that multiply by
1 + w (Gemma) and takes it off again, in bf16, which rounds them; ours are the source's own.

The tiny models' weights are integer arithmetic, so they are the same bits on any machine and version; they contain
outliers, blocks of zeros and negative zeros. One of them has sizes that are no multiples of 32, rows of zeros in every
matrix, and matrices of zeros alone and inside groups.
"""

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = Path(__file__).with_name("llmcompressor_nvfp4a16.json")
RESULTS = ROOT / "benchmarks/results/export_vs_llmcompressor.json"
SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ODD = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 40}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}),
    "odd": ("Llama", {"tie_word_embeddings": False, **ODD}),
}
"""Name -> the class's first word and what differs from SIZES. Qwen2 has biases, Qwen3 and Gemma 3 norms on q and k."""
ZERO_MATRICES = ("0.self_attn.o_proj", "0.self_attn.v_proj", "1.mlp.gate_proj", "1.mlp.up_proj")
"""In the odd model: one that stands alone, one inside a group, and a whole group."""


def tiny_model(name: str) -> Any:
    """A bf16 model whose weights depend on nothing but their names."""
    import transformers

    first, changes = TINY[name]
    config = getattr(transformers, f"{first}TextConfig" if first == "Gemma3" else f"{first}Config")
    model = getattr(transformers, f"{first}ForCausalLM")(config(**{**SIZES, **changes})).to(torch.bfloat16)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(_weights(path, parameter.shape))
            if name == "odd" and parameter.dim() == 2 and "layers" in path:
                parameter[2::7] = 0
                if any(zero in path for zero in ZERO_MATRICES):
                    parameter.zero_()
    return model.eval()


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Numbers of a size that differs by tensor, one in 100 of them 30 times larger, blocks of zeros, and -0.0."""
    index, seed = torch.arange(shape.numel(), dtype=torch.int64), zlib.crc32(name.encode())
    word = (index * 2654435761 + seed) % 2**32
    for shift, factor in ((16, 0x45D9F3B), (15, 0x27D4EB2D), (16, 1)):
        word = ((word ^ (word >> shift)) * factor) % 2**32
    weights = (word % 4001 - 2000).double() / 2000 * (0.02 + seed % 101 / 1000)
    weights[word % 97 == 0] *= 30
    weights[(index // 16) % 29 == 3] = 0.0
    weights[word % 53 == 0] = -0.0
    return weights.reshape(shape).to(torch.bfloat16)


def digests(directory: Path) -> dict[str, list[Any]]:
    """Tensor name -> [dtype, shape, SHA-256 of its bytes], over all shards of a model directory."""
    from safetensors import safe_open

    found: dict[str, list[Any]] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                found[name] = _entry(file.get_tensor(name))
    return found


def _entry(tensor: torch.Tensor) -> list[Any]:
    digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest]


def quantize_with_llmcompressor(source: str, target: str) -> None:
    """Runs in llm-compressor's environment."""
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]))
    model.save_pretrained(target, save_compressed=True)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    Path(target, "versions.json").write_text(json.dumps({name: version(name) for name in packages}))


def export_with_qerl(source: Path, target: Path) -> None:
    """Runs in this environment: what a user does."""
    from transformers import AutoModelForCausalLM

    import qerl_compile

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = qerl_compile.transform(model, "nvfp4-lora", inner="eager")
    qerl_compile.export(model, target, target="vllm")


def compare(source: Path, work: Path, llmc: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantize one directory both ways; return (what to report, what to keep as fixture)."""
    theirs, ours = work / "llmcompressor", work / "qerl"
    command = [llmc, __file__, "--quantize", str(source), str(theirs)]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    export_with_qerl(source, ours)
    expected, got, before = digests(theirs), digests(ours), digests(source)
    rounded = _rounded_norms(source)
    moved = [name for name, entry in rounded.items() if entry == expected.get(name) and got.get(name) == before[name]]
    versions = json.loads((theirs / "versions.json").read_text())
    config = json.loads((theirs / "config.json").read_text())["quantization_config"]
    report = {
        "tensors": len(expected),
        "packed_linears": sum(name.endswith("weight_packed") for name in expected),
        "bytes_compared": sum(file.stat().st_size for file in theirs.glob("*.safetensors")),
        "equal": sum(got.get(name) == entry for name, entry in expected.items()),
        "norms_that_llmcompressor_rounded": moved,
        "missing": sorted(expected.keys() - got.keys()),
        "extra": sorted(got.keys() - expected.keys()),
        "differing": [name for name, entry in expected.items() if got.get(name, entry) != entry and name not in moved],
        "equal_by_kind": _by_kind(expected, got),
        "llmcompressor_versions": versions,
    }
    return report, {"versions": versions, "quantization_config": config, "rounded": moved, "tensors": expected}


def _rounded_norms(source: Path) -> dict[str, list[Any]]:
    """What llm-compressor makes of norms that multiply by 1 + w: it stores bf16(bf16(1 + w) - 1) (offset_norm.py).

    Only names whose bytes that changes; whether a model's norms are of this kind, the comparison tells.
    """
    from safetensors import safe_open

    changed: dict[str, list[Any]] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in (name for name in file.keys() if "norm" in name):  # noqa: SIM118  # safe_open is no mapping
                weight = file.get_tensor(name)
                there_and_back = ((1.0 + weight.float()).bfloat16().float() - 1.0).bfloat16()
                if not torch.equal(there_and_back, weight):
                    changed[name] = _entry(there_and_back)
    return changed


def _by_kind(expected: dict[str, list[Any]], got: dict[str, list[Any]]) -> dict[str, str]:
    kinds: dict[str, list[bool]] = {}
    for name, entry in expected.items():
        leaf = name.rpartition(".")[2]
        kinds.setdefault(leaf if leaf.startswith("weight_") else "dense", []).append(got.get(name) == entry)
    return {kind: f"{sum(equal)} of {len(equal)}" for kind, equal in sorted(kinds.items())}


def main() -> int:
    """Compare, write results and fixture, and return the exit status."""
    parser = argparse.ArgumentParser(description="Compare our export with llm-compressor's, byte by byte.")
    parser.add_argument("--llmc", help="python of the environment that has llm-compressor")
    parser.add_argument("--quantize", nargs=2, metavar=("IN", "OUT"), help="internal: run llm-compressor here")
    parser.add_argument("models", nargs="*", type=Path, help="further bf16 model directories")
    args = parser.parse_args()
    if args.quantize:
        quantize_with_llmcompressor(*args.quantize)
        return 0
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    reports: dict[str, Any] = {}
    fixture: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sources = {f"tiny-{family}": Path(scratch, family, "source") for family in TINY}
        for family in TINY:
            tiny_model(family).save_pretrained(Path(scratch, family, "source"))
        for name, source in {**sources, **{path.name: path for path in args.models}}.items():
            work = Path(scratch, "work", name)
            work.mkdir(parents=True)
            reports[name], kept = compare(source, work, args.llmc)
            if name in sources:
                fixture[name.removeprefix("tiny-")] = kept
            print(name, json.dumps({key: value for key, value in reports[name].items() if key != "tensors"}))  # noqa: T201
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    result = {
        "what": "NVFP4A16 export against llm-compressor oneshot (round to nearest): all tensors, by SHA-256",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("compressed-tensors", "transformers", "torch")},
        "models": reports,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    FIXTURE.write_text(json.dumps(fixture, indent=None, separators=(",", ":")).replace("],", "],\n") + "\n")
    return int(any(each["differing"] or each["missing"] or each["extra"] for each in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
