"""Reading tensors in order: every way gives the file's bytes, in bounded memory, and leaves nothing running."""

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_compile import loading, tensor_reading
from qerl_compile.attach import Attacher
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError
from qerl_compile.formats.nvfp4 import quantize
from qerl_compile.loading import load
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.safetensors_header import ELEMENT_BYTES, read_header
from qerl_compile.tensor_reading import DTYPES, read_ahead, read_tensors
from tests.models import tiny_model

CPU = torch.device("cpu")
ATTENTION = "model.layers.0.self_attn"
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [], "noise": {}}


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Two files: every dtype, scalars, matrices without elements, and tensors longer than a test's blocks."""
    generator = torch.Generator().manual_seed(0)
    bytes_E = torch.randint(0, 120, (2048,), dtype=torch.uint8, generator=generator)
    tensors = {name: bytes_E[:64].clone().view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"}
    tensors |= {"BOOL": bytes_E[:5] > 60, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    second = {"long": bytes_E.view(torch.bfloat16).reshape(32, 32), "odd": bytes_E[:7].clone(), "void": torch.empty(0)}
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, content in zip(files, (tensors, second), strict=True):
        save_file(content, file)
    return files


def entries_of(files):
    return {name: entry for file in files for name, entry in read_header(file).items()}


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qerl-read")]


def open_files(directory: Path) -> list[str]:
    targets = (str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return [target for target in targets if target.startswith(str(directory))]


def same_bytes(got: torch.Tensor, want: torch.Tensor) -> bool:
    form = (got.dtype, got.shape) == (want.dtype, want.shape)
    return form and torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def test_every_dtype_that_a_header_may_name_is_read():
    assert DTYPES.keys() == ELEMENT_BYTES.keys()
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ELEMENT_BYTES


@pytest.mark.parametrize("block_bytes, blocks", [(1, 1), (24, 3), (100, 16), (1 << 20, 2)])
def test_reading_ahead_gives_the_files_bytes_in_the_files_order(shards, block_bytes, blocks):
    entries = entries_of(shards)
    want = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    got = list(read_ahead(entries, CPU, block_bytes=block_bytes, blocks=blocks))
    assert [name for name, _ in got] == list(entries)
    assert all(same_bytes(tensor, want[name]) for name, tensor in got)
    assert not readers()


def test_a_selection_in_any_order_is_read_too(shards):
    entries = entries_of(shards)
    chosen = {name: entries[name] for name in ("odd", "BF16", "void", "long", "scalar")}
    for read in (read_tensors(chosen, CPU), read_ahead(chosen, CPU, block_bytes=16)):
        got = dict(read)
        assert list(got) == list(chosen)
        assert got["scalar"].item() == 2.5
        assert same_bytes(got["long"], load_file(shards[1])["long"])


def test_nothing_to_read_is_read(shards):
    assert list(read_ahead({}, CPU)) == []
    empty = {name: entry for name, entry in entries_of(shards).items() if entry.size_bytes == 0}
    assert {name: tuple(tensor.shape) for name, tensor in read_ahead(empty, CPU)} == {"empty": (0, 4), "void": (0,)}


def test_no_more_is_read_ahead_than_the_ring_holds(shards, monkeypatch):
    begun = []
    original = tensor_reading._fill
    monkeypatch.setattr(tensor_reading, "_fill", lambda *args: begun.append(args[1]) or original(*args))
    with closing(read_ahead(entries_of(shards[:1]), CPU, block_bytes=8, blocks=3)) as tensors:
        assert next(tensors)[1].nbytes == 64  # 8 blocks, of more than 80 in the file
        assert 8 <= len(begun) < 8 + 3
        assert readers()
    assert not readers()


def test_a_file_is_closed_when_its_last_tensor_has_been_read(shards):
    files = []
    for file, content in ((shards[0].with_name(f"{i}.st"), {f"t{i}": torch.full((4,), i)}) for i in range(5)):
        save_file(content, file)
        files.append(file)
    for index, _ in enumerate(read_ahead(entries_of(files), CPU, blocks=2)):
        still = {Path(name).name for name in open_files(files[0].parent)}
        assert still <= {f"{i}.st" for i in range(index, index + 3)}
    assert not open_files(files[0].parent)


def test_a_reader_that_is_left_early_stops_and_closes_its_files(shards):
    tensors = read_ahead(entries_of(shards), CPU, block_bytes=8, blocks=4)
    next(tensors)
    tensors.close()
    assert not readers()
    assert not open_files(shards[0].parent)


def test_a_file_that_became_shorter_is_refused_by_name_and_nothing_is_left_running(shards):
    entries = entries_of(shards)
    os.truncate(shards[1], shards[1].stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"2\.safetensors: expected a file of at least .* bytes.*the end of the"):
        list(read_ahead(entries, CPU, block_bytes=256))
    assert not readers()
    assert not open_files(shards[0].parent)


def test_a_file_that_went_away_is_refused_by_name(shards):
    entries = entries_of(shards)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors: expected a readable file.*No such file"):
        list(read_ahead(entries, CPU, block_bytes=64, blocks=2))
    assert not readers()
    assert not open_files(shards[0].parent)


def test_an_error_of_the_disk_raises_where_the_tensors_are_used(shards, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"byte \d+: expected bytes that can be read.*Input/output error"):
        list(read_ahead(entries_of(shards), CPU))
    assert not readers()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A sharded Qwen2."""
    tiny_model("qwen2", layers=2, dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def through_the_ring(entries, device):
    return read_ahead(entries, device, block_bytes=1000, blocks=4)


def test_a_model_that_was_read_ahead_is_the_model_that_was_mapped(checkpoint, monkeypatch):
    want = load(checkpoint, RECIPE, inner="eager", device="cpu").state_dict()
    monkeypatch.setattr(loading, "read_tensors", through_the_ring)
    got = load(checkpoint, RECIPE, inner="eager", device="cpu").state_dict()
    assert got.keys() == want.keys()
    assert all(same_bytes(got[name], want[name]) for name in want)
    assert not readers()


def test_what_was_planned_is_told_before_a_byte_of_weights_is_read(checkpoint, monkeypatch):
    told = []

    def planned(model, plan, device):
        told.append((all(parameter.is_meta for parameter in model.parameters()), len(plan.quantize), device))

    def read(entries, device):
        told.append("read")
        return read_tensors(entries, device)

    monkeypatch.setattr(loading, "read_tensors", read)
    load(checkpoint, RECIPE, inner="eager", device="cpu", planned=planned)
    assert told == [(True, 14, CPU), "read"]


def test_a_load_that_fails_leaves_no_reader_behind(checkpoint, monkeypatch):
    names = list(open_checkpoint(checkpoint).tensors)
    victim = open_checkpoint(checkpoint).tensors[names[3]].file
    tensors = load_file(victim)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, victim, metadata={"format": "pt"})
    monkeypatch.setattr(loading, "read_tensors", through_the_ring)
    with pytest.raises(CheckpointError, match="nan") as fault:
        load(checkpoint, RECIPE, inner="eager", device="cpu")
    assert fault.traceback  # which holds the frames, and yet:
    assert not readers()
    assert not open_files(checkpoint)


def test_dense_tensors_on_the_cpu_stay_on_the_files_pages(checkpoint):
    """No second copy: what is mapped shows in the process's memory map under the file's name."""
    model = load(checkpoint, RECIPE, inner="eager", device="cpu")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(checkpoint) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    for tensor in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert any(begin <= tensor.data_ptr() < end for begin, end in ranges)


def with_group(attach) -> tuple[list, torch.Tensor | None, torch.Tensor]:
    """The members of q/k/v after `attach`, their fused storage before finishing, and the same after."""
    model = tiny_model("llama", layers=1, dtype=torch.bfloat16)
    attacher = Attacher(model, make_plan(model, Recipe.resolve(RECIPE)))
    paths = [f"{ATTENTION}.{leaf}_proj" for leaf in "qkv"]
    rest = [path for path in attacher.plan.quantize if path not in paths]
    for path in (*paths, *rest):
        attach(attacher, path, model.get_submodule(path).weight.data)
    members = [model.get_submodule(path) for path in paths]
    early = members[0]._buffers.get("fused_packed")
    attacher.finish()
    return members, early, members[0]._buffers.get("fused_packed")


def test_a_group_is_laid_together_when_it_is_packed_and_not_again_at_the_end():
    members, early, late = with_group(lambda attacher, path, weight: attacher.weight(path, weight))
    assert early is late
    assert torch.equal(late, torch.cat([module.weight_packed for module in members]))
    assert {module.weight_packed.untyped_storage().data_ptr() for module in members} == {late.data_ptr()}


def test_a_group_that_came_packed_with_unequal_scales_is_not_laid_together():
    def attach(attacher, path, weight):
        attacher.packed(path, quantize(weight * (2 if "q_proj" in path else 1)), weight.dtype)

    members, early, late = with_group(attach)
    assert (early, late) == (None, None)
    assert len({module.weight_packed.untyped_storage().data_ptr() for module in members}) == 3
