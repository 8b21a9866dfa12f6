"""Reading ahead into a GPU: the bytes, however small the ring; what is left afterwards."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_compile.loading import load
from qerl_compile.safetensors_header import read_header
from qerl_compile.tensor_reading import read_ahead, read_tensors
from tests.models import tiny_model

GPU = torch.device("cuda")
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [], "noise": {}}


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i:02}": torch.randn(700 + 13 * i, 300, generator=generator).bfloat16() for i in range(24)}
    save_file(tensors | {"scalar": torch.tensor(3.5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("block_bytes, blocks", [(4096, 1), (100_001, 2), (1 << 20, 16)])
def test_a_block_is_not_filled_again_before_it_was_copied(file, block_bytes, blocks):
    """The stream is kept busy, so that copies lag behind the reads: a ring that did not wait would mix up tensors."""
    want = load_file(file)
    busy = torch.randn(4096, 4096, device=GPU)
    got = {}
    for name, tensor in read_ahead(read_header(file), GPU, block_bytes=block_bytes, blocks=blocks):
        got[name] = tensor
        busy @ busy
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name].cpu(), want[name]) for name in want)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qerl-read")]


def test_tensors_for_a_gpu_are_read_ahead(file):
    tensors = read_tensors(read_header(file), GPU)
    assert next(tensors)[1].is_cuda
    assert [thread for thread in threading.enumerate() if thread.name.startswith("qerl-read")]
    tensors.close()


def test_a_model_loaded_to_a_gpu_has_the_bytes_of_one_loaded_to_the_cpu(tmp_path):
    tiny_model("qwen2", layers=2, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    want = load(tmp_path, RECIPE, inner="eager", device="cpu").state_dict()
    got = load(tmp_path, RECIPE, inner="eager", device="cuda").state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_what_weights_were_quantized_in_is_given_back(tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096}
    tiny_model("llama", layers=2, dtype=torch.bfloat16, **shape).save_pretrained(tmp_path)
    model = load(tmp_path, RECIPE, inner="eager", device="cuda")
    assert model.qerl.plan.groups
    segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == (0, 0)]
    assert segments
    assert [s["total_size"] for s in segments if s["active_size"] == 0] == []
