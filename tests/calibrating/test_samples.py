"""Texts become rows of one length, and no more of them are read than needed."""

import itertools

import pytest
import torch

from qerl_compile.calibrating.samples import token_rows
from qerl_compile.errors import TaskError
from tests.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_texts_are_joined_with_an_end_of_text_and_cut():
    rows = token_rows(["abcd", "efg", "hi"], TOKENIZER, samples=9, tokens=4)
    end = TOKENIZER.eos_token_id
    stream = [*TOKENIZER("abcd")["input_ids"], end, *TOKENIZER("efg")["input_ids"], end]
    assert rows.tolist() == [stream[0:4], stream[4:8], [stream[8], *TOKENIZER("hi")["input_ids"], end]]


def test_endless_texts_are_read_as_far_as_needed():
    read = []
    texts = (read.append(i) or "0123456789" for i in itertools.count())
    rows = token_rows(texts, TOKENIZER, samples=3, tokens=16)
    assert rows.shape == (3, 16)
    assert rows.dtype == torch.int64
    assert len(read) == 5


def test_every_row_begins_as_the_tokenizer_begins_texts():
    class Beginning:
        bos_token_id, eos_token_id = 0, None

        def __call__(self, text, add_special_tokens=True, **_):
            ids = TOKENIZER(text)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    rows = token_rows(["abcdef"], Beginning(), samples=9, tokens=4)
    assert rows[:, 0].tolist() == [0, 0]
    assert rows[:, 1:].flatten().tolist() == TOKENIZER("abcdef")["input_ids"]


@pytest.mark.parametrize("texts", [[], [""], ["too short"]], ids=["none", "empty", "short"])
def test_too_little_text_is_refused(texts):
    with pytest.raises(TaskError, match="at least 64 tokens, to fill one sample"):
        token_rows(texts, TOKENIZER, samples=4, tokens=64)


def test_a_single_string_is_refused():
    with pytest.raises(TaskError, match="read letter by letter"):
        token_rows("a long text", TOKENIZER, samples=1, tokens=4)
