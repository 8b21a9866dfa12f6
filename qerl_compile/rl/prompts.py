"""From a task's row to the token ids a model continues, by the model's own chat template.

    row ──system, question──▶ messages ──chat template──▶ text ──+ assistant prefix──▶ ids

A row whose prompt is a list of messages is rendered by the tokenizer's chat template (Hugging Face's sandboxed
jinja), opened for the assistant's turn. A row whose prompt is a string is taken as it is; this is TRL's rule, and
the way to feed a base model.

An assistant prefix begins the answer in the model's place: with `{expression} =` the text ends in `4 + 3 =` and a
small model answers within a few tokens. It is part of the prompt: completions, log-probabilities and rewards begin
after it. Do not end it in a space; tokenizers put the space at the head of the next word.

What this module does not do: shorten prompts (one that is too long is an error), or guard against data that spells
out special tokens such as `<|im_end|>`, which tokenizers read as those tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks.task import Row
from qerl_compile.rl.templates import FieldTemplate

Message = dict[str, str]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as text and as the token ids of that text, unpadded."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PromptFormat:
    """How rows become prompts.

    Args:
        system: a system message put before the row's messages.
        question: a template for the last user message, in place of the task's own wording (`What is {expression}?`).
        assistant_prefix: a template for the beginning of the answer (`{expression} =`).
        chat: False joins the messages' contents by blank lines, without a chat template, for base models.
        chat_template_kwargs: passed on to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        TaskError: a template is malformed.
    """

    system: str | None = None
    question: str | None = None
    assistant_prefix: str | None = None
    chat: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("question", "assistant_prefix"):
            template(getattr(self, name), name)

    def encode(self, tokenizer: Any, row: Row, max_tokens: int | None = None) -> EncodedPrompt:
        """One row as text and token ids.

        Args:
            tokenizer: a Hugging Face tokenizer.
            row: a task's row.
            max_tokens: the most tokens a prompt may have; None for no limit.

        Raises:
            TaskError: the prompt is too long, or see `render`.
        """
        text, special = self.render(tokenizer, row)
        ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
        if max_tokens is not None and len(ids) > max_tokens:
            raise TaskError(
                where=f"prompt {text[:60]!r}...",
                expected=f"at most {max_tokens} tokens",
                got=f"{len(ids)}",
                do="Raise the prompt limit or remove this row.",
            )
        if not ids:
            raise TaskError(where="prompt", expected="at least one token", got="none", do="Give the prompt some text.")
        return EncodedPrompt(text, ids)

    def render(self, tokenizer: Any, row: Row) -> tuple[str, bool]:
        """One row as text, and whether the tokenizer still has to add its special tokens.

        Raises:
            TaskError: the tokenizer has no chat template or its template refuses the messages; a template names a
                column the row lacks; a system message or question is set but the prompt has no place for it.
        """
        prefix = template(self.assistant_prefix, "assistant_prefix")
        ending = prefix.fill(row) if prefix else ""
        if isinstance(row["prompt"], str):
            for name in ("system", "question"):
                if getattr(self, name) is not None:
                    do = f"Remove {name}, or give the task's prompts as lists of messages."
                    raise TaskError(where=name, expected="a prompt made of messages", got="a prompt in text", do=do)
            return row["prompt"] + ending, True
        messages = self.messages(row)
        if not self.chat:
            return "\n\n".join(message["content"] for message in messages) + ending, True
        return self._apply_template(tokenizer, messages) + ending, False

    def messages(self, row: Row) -> list[Message]:
        """The row's messages with system message and question as set."""
        messages = [dict(message) for message in row["prompt"]]
        question = template(self.question, "question")
        if question:
            messages[-1]["content"] = question.fill(row)
        if self.system is not None:
            if messages[0]["role"] == "system":
                do = "Remove one of them."
                raise TaskError(where="system", expected="one system message", got="one in the row as well", do=do)
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def _apply_template(self, tokenizer: Any, messages: list[Message]) -> str:
        from jinja2.exceptions import TemplateError

        if not getattr(tokenizer, "chat_template", None):
            raise TaskError(
                where="tokenizer",
                expected="a chat template, because the task's prompts are messages",
                got="none (a base model)",
                do="Set chat: false in the prompt format, or use the instruction-tuned model.",
            )
        options = {**self.chat_template_kwargs, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            do = "Some templates know no system role: remove the system message, or correct the order of the roles."
            raise TaskError(where="chat template", expected=f"a place for {roles}", got=str(error), do=do) from error


def template(text: str | None, where: str) -> FieldTemplate | None:
    """The checked template, or None when it is not set."""
    return None if text is None else FieldTemplate(text, where=where)


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a completion: the generation config's (one or several) and the tokenizer's own.

    Both are needed: Llama 3 lists three in its generation config, while some fine-tunes correct only the tokenizer.

    Raises:
        TaskError: neither names any.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids = [int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None]
    if not ids:
        do = "Set eos_token_id in generation_config.json."
        raise TaskError(where="tokenizer", expected="at least one end-of-text token", got="none", do=do)
    return tuple(dict.fromkeys(ids))


def pad_token_id(tokenizer: Any, generation_config: Any = None) -> int:
    """The tokenizer's padding token, else an end token; padding is always masked, so which one is of no matter."""
    pad = tokenizer.pad_token_id
    return int(pad) if pad is not None else end_token_ids(tokenizer, generation_config)[0]


def as_completion(row: Row, text: str) -> str | list[Message]:
    """A completion in the form reward functions get it (TRL's): messages for a prompt of messages, else text."""
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
