"""Names, shapes and dtypes of the tensors, against the dialect and against what config.json promises.

No value is read for this. The dialect says which tensors a packed linear has; config.json's model, where there is one,
says how large the linear is, and otherwise its codes do. A scalar in a form that is unusual but readable is a fault of
its own kind, beside those that no reader takes. Names and dense shapes are not compared where transformers keeps
experts in one tensor, since files name them one by one.

What this module does not do: values (numbers.py), configs (configs.py), lists of dense modules (lists.py).
"""

from collections.abc import Iterator

from qerl_compile.checkup.findings import Fault
from qerl_compile.checkup.recognition import COMPRESSED, MODELOPT, TORCHAO, Contents, Dialect
from qerl_compile.checkup.skeleton import Skeleton
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.layouts.torchao import swizzled_shape

KV_LEAVES = ("k_scale", "v_scale")
WIDE = ("F32", "BF16", "F16")


def header_faults(
    contents: Contents, skeleton: Skeleton | None, *, quantized_inputs: bool, quantized_cache: bool
) -> Iterator[Fault]:
    """Yield what the headers show.

    Args:
        contents: the sorted directory.
        skeleton: what config.json promises, or None.
        quantized_inputs: whether the config describes W4A4.
        quantized_cache: whether it describes a cache of keys and values in 8 bits.
    """
    dialect = contents.dialect
    if dialect is not None:
        scaled = {path for path in contents.packed if dialect.input in contents.modules[path]}
        for path in contents.packed:
            yield from _linear_faults(contents, dialect, path, skeleton)
            # ModelOpt's readers compute a missing input scale as they go; some with and some without is a fault.
            needed = quantized_inputs and (dialect is COMPRESSED or (dialect is MODELOPT and bool(scaled)))
            if needed and path not in scaled:
                yield Fault("input-scale-missing", path, f"no {dialect.input}")
            if not quantized_inputs and path in scaled:
                yield Fault("input-scale-unexpected", path, f"{dialect.input}, and the config leaves inputs in 16 bits")
        yield from _cache_faults(contents, dialect, quantized_cache=quantized_cache)
    if skeleton is not None and not skeleton.fused_experts:
        yield from _promise_faults(contents, skeleton)


def _linear_faults(contents: Contents, dialect: Dialect, path: str, skeleton: Skeleton | None) -> Iterator[Fault]:
    leaves = contents.modules[path]
    required = [dialect.codes, dialect.block]
    required += [] if dialect is TORCHAO else [dialect.scalar]  # whose block scales may do it all
    for leaf in required:
        if leaf not in leaves:
            yield Fault("tensor-missing", f"{path}.{leaf}", "not in the files")
    promised = skeleton.linears.get(path) if skeleton else None
    shape = promised or contents.weight_shape(path)
    codes, block, scalar = (leaves.get(leaf) for leaf in (dialect.codes, dialect.block, dialect.scalar))
    if codes is not None:
        if codes.dtype != "U8":
            yield Fault("codes-dtype", f"{path}.{dialect.codes}", codes.dtype)
        if shape and codes.shape != (shape[0], shape[1] // 2):
            found = f"{list(codes.shape)} instead of {[shape[0], shape[1] // 2]}"
            yield Fault("shape", f"{path}.{dialect.codes}", found)
    if block is not None:
        if block.dtype in WIDE:
            yield Fault("block-scale-wide", f"{path}.{dialect.block}", block.dtype)
        elif block.dtype != "F8_E4M3":
            yield Fault("block-scale-integers", f"{path}.{dialect.block}", block.dtype)
        if shape and shape[1] % BLOCK:
            yield Fault("shape", path, f"K = {shape[1]}, which is no multiple of {BLOCK}")
        elif shape:
            wanted = [(shape[0], shape[1] // BLOCK)]
            wanted += [swizzled_shape(*wanted[0])] if dialect is TORCHAO else []
            if block.shape not in wanted:
                yield Fault("shape", f"{path}.{dialect.block}", f"{list(block.shape)} instead of {list(wanted[0])}")
    usual = (1,) if dialect is COMPRESSED else ()
    for leaf, entry in ((dialect.scalar, scalar), (dialect.input, leaves.get(dialect.input or ""))):
        if entry is None:
            continue
        if entry.shape not in ((), (1,)) or entry.dtype not in WIDE:
            yield Fault("shape", f"{path}.{leaf}", f"{entry.dtype} {list(entry.shape)} instead of F32 {list(usual)}")
        elif entry.dtype != "F32" or entry.shape != usual:
            yield Fault("scalar-form", f"{path}.{leaf}", f"{entry.dtype} {list(entry.shape)}, usual F32 {list(usual)}")


def _cache_faults(contents: Contents, dialect: Dialect, *, quantized_cache: bool) -> Iterator[Fault]:
    present = {(path, leaf) for path, leaves in contents.modules.items() for leaf in KV_LEAVES if leaf in leaves}
    if present and not quantized_cache:
        path, leaf = min(present)
        yield Fault("kv-scale-unexpected", f"{path}.{leaf}", f"{len(present)} such tensors")
    if quantized_cache:
        for path in contents.modules:
            attention, _, projection = path.rpartition(".")
            if projection in ("k_proj", "v_proj"):
                leaf = f"{projection[0]}_scale"
                owner = path if dialect is MODELOPT else attention
                if (owner, leaf) not in present:
                    yield Fault("kv-scale-missing", f"{owner}.{leaf}", "not in the files")


def _promise_faults(contents: Contents, skeleton: Skeleton) -> Iterator[Fault]:
    """Compare names and dense shapes with the model's; what belongs to packed linears is judged above."""
    packed, dialect = set(contents.packed), contents.dialect
    tensors = contents.checkpoint.tensors
    for name, shape in skeleton.shapes.items():
        path, _, leaf = name.rpartition(".")
        if path in packed and leaf == "weight":
            continue
        entry = tensors.get(name)
        if entry is None:
            if name not in skeleton.optional:
                yield Fault("tensor-missing", name, "config.json's model has it, the files do not")
        elif entry.shape != shape:
            yield Fault("shape", name, f"{list(entry.shape)} instead of {list(shape)}, from config.json")
    own = {dialect.codes, dialect.block, dialect.scalar, dialect.input} if dialect else set()
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        belongs = path in packed and path in skeleton.linears and leaf in own
        unusual = leaf in KV_LEAVES or name in skeleton.shapes or name.endswith(("inv_freq", "_act_per_tensor_scale"))
        if not belongs and not unusual:
            yield Fault("tensor-unexpected", name, "config.json's model has no such tensor")
