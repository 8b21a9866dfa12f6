"""Load our exports with vLLM's own Python code on a CPU, and compare what it would compute with, with what we wrote.

    pip download --no-deps vllm==0.33.0 -d DL
    python3.11 -m venv VENV && VENV/bin/pip install torch==2.13.0 transformers==5.17.0
    VENV/bin/pip install --no-deps DL/vllm-*.whl compressed-tensors==0.17.0   # and what `import vllm` then asks for
    python tests/exporters/oracle_vllm.py --vllm VENV/bin/python

Tiny Llama and Qwen2 models are exported here in every format and bit width, and loaded there: vLLM's config parser
(`override_quantization_method`, `get_quant_config`), its model classes with their fused linears, `load_weights` with
its name maps and weight loaders, and `process_weights_after_loading`. Then every fused linear's codes, block scales and
scalar, as they are handed to a GEMM, are decoded in numpy and compared with our weights laid together.

What is replaced, because the wheel's compiled parts need CUDA: the GEMM (a kernel object that does nothing), the
platform (vLLM's CPU platform), and imports of packages that a loader does not call (stubs, listed in the report). So
this says nothing about kernels. It writes benchmarks/results/vllm_loader.md and is not part of CI.
"""

import argparse
import datetime
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/vllm_loader.md"
FAMILIES = ("llama", "qwen2")
EXPORTS: dict[str, dict[str, str]] = {
    "compressed-tensors NVFP4A16": {},
    "compressed-tensors NVFP4": {"activations": "4"},
    "compressed-tensors NVFP4, FP8 cache": {"activations": "4", "kv_cache": "8"},
    "modelopt W4A16_NVFP4": {"format": "modelopt"},
    "modelopt NVFP4": {"format": "modelopt", "activations": "4"},
    "modelopt NVFP4, FP8 cache": {"format": "modelopt", "activations": "4", "kv_cache": "8"},
}
STUBBED: list[str] = []


class Stub(ModuleType):
    """A module in which every name is a class that does nothing."""

    __path__: list[str] = []  # noqa: RUF012  # a package, so that submodules are looked for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last, so it answers only for what is not installed."""

    ABSENT = ("xgrammar", "llguidance", "outlines_core", "lark", "numba", "cv2", "anthropic", "cpuinfo")
    ABSENT += ("model_hosting_container_standards", "opentelemetry", "torchaudio", "lmformatenforcer")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Stub a package of the list."""
        if name.partition(".")[0] not in self.ABSENT:
            return None
        STUBBED.append(name.partition(".")[0])
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        """An empty stub."""
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def load_with_vllm(directories: list[str]) -> None:
    """Runs in vLLM's environment: build each model, load its files, note what each linear computes with."""
    sys.meta_path.append(StubFinder())
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import CacheConfig, DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4 as ct
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.model_executor.models import registry
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    class NoGemm:
        def process_weights_after_loading(self, layer: Any) -> None:
            """What a kernel would repack stays as it was loaded."""

    ct.init_nvfp4_linear_kernel = modelopt.init_nvfp4_linear_kernel = lambda **_: NoGemm()
    ct.expose_input_quant_key = modelopt.expose_input_quant_key = lambda *_: None
    registry._run_in_subprocess = lambda inspect: inspect()  # a process of its own would not have the stubs
    for number, directory in enumerate(directories):
        model_config = ModelConfig(model=directory, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True)
        cache = CacheConfig(cache_dtype=resolve_kv_cache_dtype_string("auto", model_config))  # as the engine does
        config = VllmConfig(model_config=model_config, cache_config=cache, device_config=DeviceConfig("cpu"))
        with set_current_vllm_config(config):
            if number == 0:
                init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", 0, "gloo")
                initialize_model_parallel(1, 1)
            torch.set_default_dtype(torch.bfloat16)
            model = initialize_model(vllm_config=config)
            DefaultModelLoader(LoadConfig()).load_weights(model, model_config)
            process_weights_after_loading(model, model_config, torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        found = {"vllm": vllm.__version__, "method": model_config.quantization, "stubbed": sorted(set(STUBBED))}
        modules = dict(model.named_modules())
        caches = [module for module in modules.values() if hasattr(module, "_k_scale_float")]
        found["cache"] = [[float(module._k_scale_float), float(module._v_scale_float)] for module in caches]
        found["linears"] = {}
        for path, module in modules.items():
            if hasattr(module, "weight_global_scale"):
                w_NK = decoded(module.weight.data, module.weight_scale.data, module.weight_global_scale.item())
                np.save(Path(directory, f"{path}.npy"), w_NK)
                inputs = getattr(module, "input_global_scale", None)
                found["linears"][path] = None if inputs is None else inputs.item()
        Path(directory, "found.json").write_text(json.dumps(found))


def decoded(codes_NK2: torch.Tensor, block_NG: torch.Tensor, multiplier: float) -> np.ndarray:
    """NVFP4 by its definition, in numpy."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    codes = codes_NK2.numpy()
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
    values = np.where(codes & 8, -1, 1) * table[codes & 7]
    return (values * np.repeat(block_NG.float().numpy(), 16, axis=1) * np.float32(multiplier)).astype(np.float32)


def export_all(family: str, scratch: Path) -> dict[str, Path]:
    """Runs in this environment: one calibrated tiny model in every format; returns the directories."""
    import transformers

    import qerl_compile

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    first = family.capitalize()
    torch.manual_seed(0)
    config = getattr(transformers, f"{first}Config")(**sizes, tie_word_embeddings=family == "qwen2")
    model = getattr(transformers, f"{first}ForCausalLM")(config).to(torch.bfloat16).eval()
    model = qerl_compile.transform(model, "nvfp4-lora", inner="eager")
    for path, module in list(model.named_modules()):
        if "weight_packed" in module._parameters:
            amax = 2.0 + len(path.rpartition(".")[0]) + 0.25 * path.endswith(("o_proj", "down_proj"))
            module.register_buffer("input_global_scale", torch.tensor([2688 / amax]))
        if path.endswith("self_attn"):
            module.register_buffer("k_scale", torch.tensor([0.0123]))
            module.register_buffer("v_scale", torch.tensor([0.0456]))
    directories: dict[str, Path] = {}
    for index, (name, options) in enumerate(EXPORTS.items()):
        directories[name] = scratch / family / str(index)
        qerl_compile.export(model, directories[name], target="vllm==0.33", **options)
    expected: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        if "weight_packed" in module._parameters:
            multiplier = module.weight_global_scale.reciprocal().item()
            expected[path] = decoded(module.weight_packed.data, module.weight_scale.data, multiplier)
    np.savez(scratch / f"{family}.npz", **expected)  # pyright: ignore[reportArgumentType]
    return directories


def compare(expected: dict[str, np.ndarray], directory: Path, found: dict[str, Any]) -> tuple[int, float]:
    """Return (fused linears, largest relative difference of a decoded weight), all of ours laid together by name."""
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    worst, seen = 0.0, set()
    for path in found["linears"]:
        parent, _, leaf = path.rpartition(".")
        members = [f"{parent}.{name}" for name in fused.get(leaf, (leaf,))]
        seen.update(members)
        ours, theirs = np.concatenate([expected[member] for member in members]), np.load(directory / f"{path}.npy")
        difference = np.abs(ours - theirs) / np.maximum(np.abs(ours), 1e-30)
        worst = max(worst, float(np.where(ours == theirs, 0, difference).max()))
    if seen != set(expected):
        raise AssertionError(f"vLLM has not made packed linears of {sorted(set(expected) - seen)}")
    return len(found["linears"]), worst


def main() -> int:
    """Export, load in vLLM's environment, compare, write the report; 1 if one is refused or decodes otherwise."""
    parser = argparse.ArgumentParser(description="Load our exports with vLLM's Python loader on a CPU.")
    parser.add_argument("--vllm", help="python of the environment that has vLLM")
    parser.add_argument("--load", nargs="+", metavar="DIRECTORY", help="internal: load these directories here")
    args = parser.parse_args()
    if args.load:
        load_with_vllm(args.load)
        return 0
    sys.path.insert(0, str(ROOT))
    rows: list[str] = []
    failures, warnings, found = 0, 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            directories = export_all(family, Path(scratch))
            expected = dict(np.load(Path(scratch, f"{family}.npz")))
            environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
            command = [args.vllm, __file__, "--load", *map(str, directories.values())]
            ran = subprocess.run(command, capture_output=True, text=True, env=environment)
            warnings += sum("global scale" in line for line in (ran.stdout + ran.stderr).splitlines())
            if ran.returncode:
                print(ran.stderr[-4000:])  # noqa: T201
                failures += 1
            for name, directory in directories.items():
                if not (directory / "found.json").is_file():
                    rows.append(f"| {family} | {name} | not loaded | | | | |")
                    continue
                found = json.loads((directory / "found.json").read_text())
                linears, worst = compare(expected, directory, found)
                failures += worst > 2e-7
                inputs = len({value for value in found["linears"].values() if value is not None})
                caches = ", ".join(f"{k:.5g} and {v:.5g}" for k, v in sorted({tuple(each) for each in found["cache"]}))
                rows.append(
                    f"| {family} | {name} | `{found['method']}` | {linears} | {worst:.1e} | {inputs} | {caches} |"
                )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    head = ("model", "export", "vLLM's method", "fused linears", "largest difference", "input scales", "k and v scale")
    RESULTS.write_text(
        f"# vLLM {found['vllm']}'s Python loader on our exports\n\n"
        f"{datetime.date.today().isoformat()}, on top of commit {commit.strip()}, by tests/exporters/oracle_vllm.py on "
        f"a CPU: {sum('not loaded' not in row for row in rows)} of {len(rows)} directories loaded, "
        f"{warnings} warnings about global scales.\n\n"
        "What ran: vLLM's config parser, model classes, `load_weights` with its name maps and weight loaders, and "
        "`process_weights_after_loading`. What did not: its kernels (the GEMM object was replaced), a GPU, a server. "
        f"Packages that a loader does not call were stubs: {', '.join(found['stubbed'])}.\n\n"
        "`largest difference`: of a weight as vLLM would multiply with it (what it holds after loading, decoded in "
        "numpy), relative to ours; one unit in the last place of float32 is 1.2e-7. `input scales`: different values "
        "among the loaded linears. `k and v scale`: of the cache, 1 where the export has none.\n\n"
        f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n" + "\n".join(rows) + "\n"
    )
    print("\n".join(rows))  # noqa: T201
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
