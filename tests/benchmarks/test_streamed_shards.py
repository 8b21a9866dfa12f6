"""The benchmark of streaming: shards that begin as holes, the gate before them, and the look at what was read."""

import argparse

import pytest
import torch

from benchmarks import streamed_shards as bench
from qerl_compile import loading
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.tensor_reading import read_tensors

CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path):
    return bench.write_holes("tiny", None, tmp_path, 100_000)


def test_holes_are_a_checkpoint_to_the_judge_and_take_no_room(shards):
    tensors = open_checkpoint(shards[0].parent).tensors
    assert len(shards) > 3
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"} <= tensors.keys()
    assert {entry.dtype for entry in tensors.values()} == {"BF16"}
    assert all(file.stat().st_blocks * 512 <= 8192 < file.stat().st_size for file in shards)


@pytest.mark.parametrize("cached", [False, True])
def test_a_filled_shard_holds_random_numbers_and_its_header(shards, cached):
    header, size = shards[1].read_bytes()[: bench.data_begin(shards[1])], shards[1].stat().st_size
    bench.fill(shards[1], bench.random_bf16(30_000), first=bench.STEP, cached=cached)
    content = shards[1].read_bytes()
    assert (content[: len(header)], len(content)) == (header, size)
    numbers = torch.frombuffer(bytearray(content[len(header) :]), dtype=torch.bfloat16).float()
    assert numbers.isfinite().all()
    assert numbers.std().item() == pytest.approx(bench.STANDARD_DEVIATION, rel=0.1)
    assert (numbers == 0).sum() < len(numbers) / 1000


def test_the_gate_lets_a_reader_through_when_a_shard_is_full_and_shards_are_emptied_behind_it(shards):
    entries = open_checkpoint(shards[0].parent).tensors
    producer = bench.Producer(shards, random_bytes=30_000, cached=True, emptied=True)
    try:
        read = [(name, bool((tensor == 0).all())) for name, tensor in producer.gated(read_tensors)(entries, CPU)]
        producer._process.join(30)
    finally:
        producer.end()
    assert read == [(name, False) for name in entries]
    assert len(producer.fill_s) == len(shards)
    assert [file.stat().st_size for file in shards] == [bench.data_begin(file) for file in shards]


def test_a_producer_that_dies_is_noticed(shards):
    producer = bench.Producer([*shards, shards[0].with_name("absent")], random_bytes=30_000, cached=True, emptied=False)
    entries = open_checkpoint(shards[0].parent).tensors
    try:
        with pytest.raises(RuntimeError, match=f"died after {len(shards)}"):
            list(producer.gated(read_tensors)(entries, CPU))
    finally:
        producer.end()


def test_a_checkpoint_that_is_never_whole_is_loaded_and_its_export_again(tmp_path):
    before = loading.read_tensors
    options = argparse.Namespace(
        size="tiny", layers=1, recipe="qerl-nvfp4-aqn", device="cpu", cached=False, mapped=False
    )
    model, row = bench.stream(options, tmp_path)
    assert loading.read_tensors is before
    assert row["shards"] > 3
    assert row["gb_per_s"] > 0
    assert row["rss_anon_peak_gb"] >= row["rss_anon_before_gb"] > 0
    expected = bench.sums(model)
    bench.write_packed(model, tmp_path / "packed")
    assert bench.load_packed(tmp_path / "packed", options, expected)["packed_gb"] == row["packed_gb"]
    with pytest.raises(RuntimeError, match="other codes"):
        bench.load_packed(tmp_path / "packed", options, {path: number + 1 for path, number in expected.items()})


def test_weights_of_zeros_are_noticed(shards):
    """What a reader gets that comes before the producer."""
    from qerl_compile.loading import load

    model = load(shards[0].parent, "qerl-nvfp4-aqn", device="cpu", inner="eager")
    with pytest.raises(RuntimeError, match="holds zeros"):
        bench.sums(model)


def test_plain_reads_of_a_part_are_timed(shards, monkeypatch):
    monkeypatch.setattr(bench, "PROBE_BYTES", shards[0].stat().st_size // 2)
    assert all(bench.plain_read_gb_per_s(shards[0], threads) > 0 for threads in (1, 4))
