"""Perplexity beside transformers' own loss, the windows, and the texts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qerl_compile.errors import CheckpointError
from qerl_compile.perplexity import perplexity, read_texts, sample_texts, token_nats, token_windows
from tests.models import tiny_model
from tests.tokenizer import byte_tokenizer

TEXTS = ["Bread is one of the oldest things.", "Water boils."]


class LetterTokenizer:
    """One token a letter, with or without a token before each text."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*first, *(ord(letter) - ord("a") + 1 for letter in text)]}


def lists(windows: list[torch.Tensor]) -> list[list[int]]:
    return [window.tolist() for window in windows]


def test_it_is_the_exponential_of_the_loss_that_transformers_reports():
    model, tokenizer = tiny_model("llama", layers=1, vocab_size=260), byte_tokenizer()
    ids_1T = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        theirs = model(input_ids=ids_1T, labels=ids_1T).loss
    assert perplexity(model, tokenizer, TEXTS[:1]) == pytest.approx(math.exp(theirs), rel=1e-5)


def test_windows_and_texts_are_weighed_by_how_many_tokens_they_predict():
    model, tokenizer = tiny_model("llama", layers=1, vocab_size=260), byte_tokenizer()
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 10):
            ids_1T = torch.tensor([ids[start : start + 10]])
            predicted = ids_1T.shape[1] - 1
            if predicted:
                with torch.no_grad():
                    nats += model(input_ids=ids_1T, labels=ids_1T).loss.item() * predicted
                count += predicted
    assert perplexity(model, tokenizer, TEXTS, window=10) == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary():
    logits_TV = torch.zeros(5, 40)
    assert token_nats(logits_TV, torch.arange(5)).tolist() == pytest.approx([math.log(40)] * 4)


def test_chunks_of_rows_do_not_change_the_result():
    logits_TV = torch.randn(200, 11, generator=torch.Generator().manual_seed(0))
    ids_T = torch.arange(200) % 11
    whole = nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")
    torch.testing.assert_close(token_nats(logits_TV, ids_T), whole)


@pytest.mark.parametrize(
    ("texts", "options", "bos", "expected"),
    [
        (["abcde"], {"window": 2}, None, [[1, 2], [3, 4]]),  # a rest of one token predicts nothing
        (["abcde"], {"window": 3}, None, [[1, 2, 3], [4, 5]]),
        (["ab", "cd"], {"window": 9}, None, [[1, 2], [3, 4]]),
        (["abcde"], {"window": 3}, 0, [[0, 1, 2], [0, 3, 4], [0, 5]]),
        (["abcde", "fgh"], {"window": 3, "max_tokens": 5}, None, [[1, 2, 3], [4, 5]]),
        (["abcde", "fgh"], {"window": 3, "max_tokens": 7}, None, [[1, 2, 3], [4, 5], [6, 7]]),
        (["abcde", "fgh"], {"window": 3, "max_tokens": 4}, None, [[1, 2, 3]]),
        (["a", "bc"], {"window": 9}, None, [[2, 3]]),
    ],
)
def test_texts_are_cut_by_themselves_and_begin_as_the_tokenizer_begins_them(texts, options, bos, expected):
    assert lists(token_windows(LetterTokenizer(bos), texts, **options)) == expected


@pytest.mark.parametrize("texts", [[], ["", "a"]])
def test_texts_without_a_token_to_predict_are_refused(texts):
    with pytest.raises(CheckpointError, match="at least one token to predict"):
        token_windows(LetterTokenizer(), texts)


def test_the_sample_is_a_page_of_plain_text():
    (text,) = sample_texts()
    assert 5000 < len(text) < 8000
    assert text.isascii()


def test_a_text_file_is_one_text_and_a_jsonl_file_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": "7"}\n\n{"question": "2+2?", "answer": "4", "n": 3}\n')
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert read_texts(tmp_path / "a.jsonl") == ["one", "2+2?\n\n4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a\.txt: expected text in UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"n": 1}', r"a\.jsonl:2: expected an object with a string in it; got {'n': 1}"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b"{", r"a\.jsonl:1"),
    ],
)
def test_a_file_that_holds_no_text_is_refused_by_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_texts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a readable file"):
        read_texts(tmp_path / "none.txt")


def test_the_model_is_called_without_a_cache():
    calls = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **given):
            calls.append(given)
            return SimpleNamespace(logits=torch.zeros(*given["input_ids"].shape, 30))

    assert perplexity(Model(), LetterTokenizer(), ["abc"]) == pytest.approx(30)
    assert [call["use_cache"] for call in calls] == [False]
