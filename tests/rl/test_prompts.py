from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from qerl_compile.errors import TaskError
from qerl_compile.rl.prompts import PromptFormat, as_completion, end_token_ids, pad_token_id
from qerl_compile.rl.templates import FieldTemplate

ROW = {
    "prompt": [{"role": "user", "content": "State the answer: 4 + 3 ="}],
    "answer": "7",
    "metadata": {"expression": "4 + 3", "num_terms": 2, "answer": "shadowed", "difficulty": {"a": 1}},
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{expression} =", "4 + 3 ="),
        ("{num_terms}{num_terms}", "22"),
        ("{{x}} {answer}", "{x} 7"),
        ("a{{", "a{"),
    ],
)
def test_holes_are_filled_from_columns_and_then_metadata(template: str, expected: str) -> None:
    assert FieldTemplate(template, where="t").fill(ROW) == expected


@pytest.mark.parametrize(
    "template",
    ["{", "}", "{}", "{0}", "{a b}", "{answer.__class__}", "{metadata[expression]}", "{answer!r}", "{answer:>999}"],
)
def test_anything_but_a_bare_name_is_refused_when_it_is_written(template: str) -> None:
    with pytest.raises(TaskError, match="bare"):
        FieldTemplate(template, where="assistant_prefix")
    with pytest.raises(TaskError, match="assistant_prefix"):
        PromptFormat(assistant_prefix=template)


def test_braces_in_the_data_are_data() -> None:
    hostile = "{answer.__class__} {{"
    assert FieldTemplate("{q}!", where="t").fill({"prompt": "", "q": hostile}) == hostile + "!"


@pytest.mark.parametrize("name", ["missing", "difficulty", "metadata", "prompt"])
def test_a_column_that_is_no_text_is_an_error_that_lists_the_others(name: str) -> None:
    with pytest.raises(TaskError, match="This task has answer, expression, num_terms"):
        FieldTemplate(f"{{{name}}}", where="t").fill(ROW)


def test_messages_are_rendered_by_the_chat_template(tokenizer) -> None:
    encoded = PromptFormat().encode(tokenizer, ROW)
    assert encoded.text == "<|im_start|>user\nState the answer: 4 + 3 =<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.ids[0] == 1
    assert encoded.ids.count(1) == 2
    assert encoded.ids.count(2) == 1
    assert tokenizer.decode(list(encoded.ids)) == encoded.text


def test_system_question_and_prefix_each_have_their_place(tokenizer) -> None:
    prompt = PromptFormat(system="Be brief.", question="What is {expression}?", assistant_prefix="{expression} =")
    assert prompt.encode(tokenizer, ROW).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 4 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n4 + 3 ="
    )
    assert ROW["prompt"][0]["content"] == "State the answer: 4 + 3 ="  # the row itself is left alone


def test_a_text_prompt_gets_no_chat_template(tokenizer) -> None:
    row = {"prompt": "2 + 2", "answer": "4"}
    assert PromptFormat(assistant_prefix=" =").render(tokenizer, row) == ("2 + 2 =", True)


def test_special_tokens_are_added_to_text_and_not_twice_to_a_rendered_chat(tokenizer) -> None:
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert PromptFormat().encode(tokenizer, {"prompt": "2"}).ids[0] == 0
    assert PromptFormat(chat=False).encode(tokenizer, ROW).ids[0] == 0
    assert PromptFormat().encode(tokenizer, ROW).ids.count(0) == 0


def test_without_chat_the_contents_are_joined(tokenizer) -> None:
    prompt = PromptFormat(system="Sums.", chat=False, assistant_prefix=" {answer}")
    assert prompt.render(tokenizer, ROW) == ("Sums.\n\nState the answer: 4 + 3 = 7", True)


def test_options_reach_the_chat_template_but_cannot_close_the_turn(tokenizer) -> None:
    tokenizer.chat_template = "{{ mode }}{% if add_generation_prompt %}open{% endif %}"
    options = {"mode": "fast ", "add_generation_prompt": False, "tokenize": True}
    assert PromptFormat(chat_template_kwargs=options).encode(tokenizer, ROW).text == "fast open"


@pytest.mark.parametrize("prompt", [PromptFormat(system="x"), PromptFormat(question="x")])
def test_settings_that_a_text_prompt_has_no_place_for_are_refused(tokenizer, prompt: PromptFormat) -> None:
    with pytest.raises(TaskError, match="a prompt made of messages"):
        prompt.encode(tokenizer, {"prompt": "2 + 2", "answer": "4"})


def test_two_system_messages_are_refused(tokenizer) -> None:
    row = {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(TaskError, match="one system message"):
        PromptFormat(system="c").encode(tokenizer, row)


def test_a_base_model_without_chat_template_is_told_what_to_do(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TaskError, match="chat: false"):
        PromptFormat().encode(tokenizer, ROW)
    assert PromptFormat(chat=False).encode(tokenizer, ROW).text == "State the answer: 4 + 3 ="


def test_a_template_that_refuses_the_roles_is_reported(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(TaskError, match=r"a place for system, user; got System role not supported"):
        PromptFormat(system="x").encode(tokenizer, ROW)


def test_a_template_cannot_leave_its_sandbox(tokenizer) -> None:
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TaskError, match="unsafe"):
        PromptFormat().encode(tokenizer, ROW)


def test_a_prompt_that_is_too_long_is_an_error_and_never_cut(tokenizer) -> None:
    length = len(PromptFormat().encode(tokenizer, ROW).ids)
    assert len(PromptFormat().encode(tokenizer, ROW, max_tokens=length).ids) == length
    with pytest.raises(TaskError, match=f"at most {length - 1} tokens; got {length}"):
        PromptFormat().encode(tokenizer, ROW, max_tokens=length - 1)


def test_an_empty_prompt_is_refused(tokenizer) -> None:
    with pytest.raises(TaskError, match="at least one token"):
        PromptFormat().encode(tokenizer, {"prompt": ""})


@pytest.mark.parametrize(
    ("configured", "own", "expected"),
    [
        (None, 2, (2,)),
        (7, 2, (7, 2)),
        ([7, 8], 8, (7, 8)),
        ([128001, 128008, 128009], 128009, (128001, 128008, 128009)),
        ([5], None, (5,)),
        (0, None, (0,)),
    ],
)
def test_every_end_token_counts_once(configured, own, expected: tuple[int, ...]) -> None:
    tokenizer = SimpleNamespace(eos_token_id=own)
    assert end_token_ids(tokenizer, SimpleNamespace(eos_token_id=configured)) == expected


def test_a_model_without_end_token_is_refused() -> None:
    with pytest.raises(TaskError, match="eos_token_id"):
        end_token_ids(SimpleNamespace(eos_token_id=None))


def test_padding_falls_back_to_an_end_token() -> None:
    assert pad_token_id(SimpleNamespace(pad_token_id=0, eos_token_id=2)) == 0
    assert pad_token_id(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2


def test_completions_take_the_form_of_their_prompts() -> None:
    assert as_completion(ROW, " 7") == [{"role": "assistant", "content": " 7"}]
    assert as_completion({"prompt": "2 + 2"}, " 4") == " 4"
