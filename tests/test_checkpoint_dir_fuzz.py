"""Whatever a directory holds: a refusal in our words, or an acceptance that the safetensors library shares.

A sample of what tests/attacks/fuzz.py does at length; `QERL_FUZZ=100` widens it here.
"""

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.errors import CheckpointError
from qerl_compile.strict_json import members, parse_json
from tests.attacks.judge import judged
from tests.attacks.making import healthy, packed, with_header, with_shard
from tests.attacks.mutate import mutated_directory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "U8", "F8_E4M3", "C64"]) | JSON,
        "shape": st.lists(st.integers(-1, 8), max_size=10) | JSON,
        "data_offsets": st.tuples(st.integers(0, 64), st.integers(0, 64)) | JSON,
    }
)


def test_the_judge_accepts_a_healthy_directory(tmp_path: Path) -> None:
    assert isinstance(judged(healthy(tmp_path)), CheckpointDirectory)


@given(rng=st.randoms(use_true_random=False))
def test_bent_directories_are_refused_or_shared(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judged(mutated_directory(rng, Path(folder)))


@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_shard_are_refused_or_shared(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judged(with_shard(Path(folder), raw))


@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_as_a_header_are_refused_or_shared(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judged(with_shard(Path(folder), packed(raw, bytes(8))))


@given(header=st.dictionaries(st.text(max_size=12), ENTRY | JSON, max_size=4), data_bytes=st.integers(0, 96))
def test_arbitrary_headers_are_refused_or_shared(header: dict[str, object], data_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judged(with_header(Path(folder), header, data_bytes=data_bytes))


@given(text=st.text(alphabet='{}[]:," \\ab0-1e', max_size=40))
def test_members_reads_what_the_whole_document_parser_reads(text: str) -> None:
    try:
        whole = parse_json(text.encode(), where="x")
    except CheckpointError:
        whole = None
    if isinstance(whole, dict):
        assert dict(members(text, where="x", max_characters=lambda key: 100)) == whole
    else:
        with pytest.raises(CheckpointError):
            list(members(text, where="x", max_characters=lambda key: 100))
