"""NVFP4 files decoded a second time: bytes, json and numpy, and nothing of qerl_compile, torch or safetensors.

Written from the format's description, element by element where our code permutes, so that a shared mistake is unlikely.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def e4m3(byte: int) -> float:
    """One float8_e4m3fn: sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.array([e4m3(byte) for byte in range(256)], dtype=np.float32)


def raw_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors as bytes (uint8, last axis times the element size), numbers where numpy has the dtype; metadata."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    kinds = {"U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32, "BF16": np.uint16, "F16": np.float16}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], dtype=kinds[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
    return tensors, metadata


def decoded(directory: Path) -> dict[str, np.ndarray]:
    """Every packed weight of a one-file checkpoint as float32 [N, K], by module path."""
    tensors, metadata = raw_tensors(directory / "model.safetensors")
    weights = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            divisor = tensors[f"{path}.weight_global_scale"].reshape(())
            weights[path] = _decode(array, tensors[f"{path}.weight_scale"], np.float32(1) / divisor)
        elif leaf == "weight_scale_2":
            weights[path] = _decode(tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"], array.reshape(()))
        elif leaf == "_weight_qdata":
            facts = json.loads(metadata[f"{path}.weight"])["_data"]
            blocks = tensors[f"{path}._weight_scale"]
            if facts["is_swizzled_scales"]:
                blocks = _rows_again(blocks, array.shape[0], array.shape[1] // 8)
            weights[path] = _decode(array, blocks, tensors[f"{path}._weight_per_tensor_scale"].reshape(()))
    return weights


def _decode(codes: np.ndarray, blocks: np.ndarray, multiplier: Any) -> np.ndarray:
    values = np.empty((codes.shape[0], codes.shape[1] * 2), dtype=np.float32)
    values[:, 0::2], values[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
    return values * np.repeat(E4M3[blocks], 16, axis=1) * np.float32(multiplier)


def _rows_again(stored: np.ndarray, rows: int, blocks: int) -> np.ndarray:
    flat, across = stored.reshape(-1), -(-blocks // 4)
    plain = np.empty((rows, blocks), dtype=np.uint8)
    for row in range(rows):
        for block in range(blocks):
            tile = (row // 128) * across + block // 4
            plain[row, block] = flat[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4]
    return plain
