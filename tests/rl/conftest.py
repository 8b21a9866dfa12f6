import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizer import byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
