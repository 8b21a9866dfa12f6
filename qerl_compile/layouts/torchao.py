"""torchao's NVFP4Tensor as transformers saves it (torchao 0.18): `TorchAoConfig(NVFP4WeightOnlyConfig())`.

    M._weight_qdata                  U8       [N, K/2]
    M._weight_scale                  F8_E4M3  [32 ceil(N/128), 16 ceil(G/4)], swizzled; or [N, G]
    M._weight_per_tensor_scale       F32      []     amax / 2688: a multiplier; absent if block scales do it all
    M._weight_act_per_tensor_scale   F32      []     amax / 2688 of the input, if it was calibrated

The metadata of each shard say under the dense name `M.weight` what the tensor was, in JSON:

    {"_type": "NVFP4Tensor", "_data": {"is_swizzled_scales": true, "block_size": 16, "act_quant_kwargs": null, ...},
     "_tensor_data_names": ["per_tensor_scale", "qdata", "scale"]}

Swizzled is the order in which tensor cores read block scales (cuBLAS, "block scaling factors layout"): tiles of 128
rows by 4 blocks, each stored as 32 lines of 16 bytes,

    byte 16 b + 4 a + c  of a tile   =   row 32 a + b, block c            a < 4, b < 32, c < 4

with zeros where the tiles jut out over the matrix. Undoing it is a permutation of bytes, so nothing is rounded.

What this module does not do: other tensor types of torchao (int4, float8): they are refused by name.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor

from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.layouts.described import check_fields
from qerl_compile.layouts.packed_linear import SIXTEEN_BIT_INPUTS, Layout, PackedLinear, require
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint, shown

PLAIN, PACKED = "Tensor", "NVFP4Tensor"
FACTS = {"block_size": (16,), "is_swizzled_scales": (True, False)}
TILE_ROWS, TILE_BLOCKS = 128, 4
LINES = 32  # of a tile, each 16 bytes: one of four groups of rows after another, 4 blocks each


def read(checkpoint: CheckpointDirectory, given: Mapping[str, Any], where: str) -> Layout:
    """Describe a directory whose config says torchao.

    Args:
        checkpoint: the judged directory.
        given: its quantization_config; what decides is in the shards' metadata.
        where: file and key of that, for errors.

    Raises:
        CheckpointError: another tensor type, or a packed weight of which a tensor is missing.
    """
    linears: dict[str, PackedLinear] = {}
    quantized_inputs = False
    for shard in checkpoint.shards:
        for name, tensor in _described(shard).items():
            kind = tensor.get("_type")
            if kind == PLAIN:
                continue
            if kind != PACKED or not name.endswith(".weight"):
                refuse_checkpoint(
                    f"{shard}: __metadata__[{shown(name)}]",
                    f"a weight of type {PACKED}, or a plain {PLAIN}",
                    shown(kind),
                    do="Start from the bf16 checkpoint of this model.",
                )
            path = name.removesuffix(".weight")
            facts = check_fields(tensor.get("_data"), FACTS, f"{shard}: __metadata__[{shown(name)}]._data")
            linears[path] = _linear(path, tensor, checkpoint, swizzled=facts["is_swizzled_scales"])
            quantized_inputs |= facts.get("act_quant_kwargs") is not None
    if not linears:
        refuse_checkpoint(
            where,
            f"tensors of torchao's {PACKED}",
            f"none ({shown(given.get('quant_type'))})",
            do="Start from the bf16 checkpoint of this model.",
        )
    return Layout("torchao NVFP4Tensor", linears, notes=(SIXTEEN_BIT_INPUTS,) if quantized_inputs else ())


def swizzled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """Return the shape in which torchao stores swizzled block scales of a weight with `rows` and `blocks` per row."""
    return LINES * ceil(rows / TILE_ROWS), TILE_BLOCKS * 4 * ceil(blocks / TILE_BLOCKS)


def unswizzle(stored: Tensor, rows: int, blocks: int) -> Tensor:
    """Put block scales in rows again.

    Args:
        stored: of `swizzled_shape(rows, blocks)`, any dtype of one byte.
        rows: N.
        blocks: G.

    Returns:
        the same dtype, [N, G].
    """
    tiles_down, tiles_across = ceil(rows / TILE_ROWS), ceil(blocks / TILE_BLOCKS)
    tiles = stored.reshape(tiles_down, tiles_across, LINES, 4, TILE_BLOCKS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(tiles_down * TILE_ROWS, tiles_across * TILE_BLOCKS)
    return padded[:rows, :blocks].contiguous()


def _linear(path: str, tensor: Mapping[str, Any], checkpoint: CheckpointDirectory, *, swizzled: bool) -> PackedLinear:
    parts = {"qdata": "the codes", "scale": "the block scales", "per_tensor_scale": "the multiplier"}
    parts["act_per_tensor_scale"] = "the scale of the input"
    named = tensor.get("_tensor_data_names")
    there = [part for part in parts if part in ("qdata", "scale") or (isinstance(named, list) and part in named)]
    names = {part: f"{path}._weight_{part}" for part in there}
    require(path, {names[part]: parts[part] for part in there}, checkpoint.tensors, checkpoint.root)
    return PackedLinear(
        names["qdata"],
        names["scale"],
        names.get("per_tensor_scale"),
        "multiplier",
        names.get("act_per_tensor_scale"),
        swizzled_shape if swizzled else None,
        unswizzle if swizzled else None,
    )


def _described(shard: Path) -> dict[str, dict[str, Any]]:
    """Return what a shard's metadata say of its tensors, by dense name."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as reader:
        metadata = reader.metadata() or {}
    described: dict[str, dict[str, Any]] = {}
    for name, text in metadata.items():
        if not text.startswith("{"):  # "format" and "tensor_names"
            continue
        value = parse_json(text.encode(), where=f"{shard}: __metadata__[{shown(name)}]")
        if isinstance(value, dict) and "_type" in value:
            described[name] = value
    return described
