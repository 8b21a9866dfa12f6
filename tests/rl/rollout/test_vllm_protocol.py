"""The recording of vLLM's interface: that it covers what the sampler relies on, and how it is read from source."""

from qerl_compile.rl.rollout.vllm import OLDEST
from qerl_compile.rl.rollout.vllm_update import RANKS
from tests.rl.rollout import record_vllm_protocol
from tests.rl.rollout.fake_vllm import PROTOCOL, VERSIONS


def test_the_recording_has_the_oldest_supported_version_and_newer_ones():
    assert VERSIONS[0] == ".".join(map(str, OLDEST))
    assert len(VERSIONS) >= 3


def test_every_recorded_version_has_what_no_signature_shows():
    for recorded in PROTOCOL.values():
        assert {"raw_logprobs", "processed_logprobs"} <= set(recorded["LogprobsMode"])
        assert set(RANKS) <= set(recorded["max_lora_rank"])
        assert "get_model" in recorded["Worker"]
        assert not {name for name in recorded["Worker"] if name.startswith("qerl_")}


def test_the_recorder_reads_signatures_and_fields_from_source(tmp_path):
    source = '''
class Thing:
    """Text."""
    _private: int = 0
    first: int
    second: str | None = None

    def call(self, a, b=2, *, c: int = 3, d, **rest): ...
'''
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "new.py").write_text(source)
    module = record_vllm_protocol.tree(tmp_path, "old.py", "new.py")
    assert record_vllm_protocol.fields(module, "Thing") == {"first": None, "second": "None"}
    assert record_vllm_protocol.method(module, "Thing", "call") == [
        ["a", "POSITIONAL_OR_KEYWORD", None],
        ["b", "POSITIONAL_OR_KEYWORD", "2"],
        ["c", "KEYWORD_ONLY", "3"],
        ["d", "KEYWORD_ONLY", None],
        ["rest", "VAR_KEYWORD", None],
    ]
