"""Conversations as text: rendered by a chat template, with the place of each message."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qk_sniffer.errors import UserError, last_line, shortened

FORMATS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
"""The keys of a message that say who speaks, and what."""

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NO_TEXTS = ("role", "type", "id", "tool_call_id")
"""Keys whose values a template may check, and doesn't show as what somebody says."""

_STAND_IN = "\ue000"
"""A character of the private use area, which no text of a conversation is likely to have."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """The text of one message in a rendered conversation, without what the template writes around it.

    Attributes:
        role: Who speaks.
        start: Its first character.
        stop: The character behind its last.
    """

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A text as the model reads it.

    Attributes:
        text: All of it.
        n_prompt: Characters before the last answer of an assistant; all where there is none.
        spans: The text of each message of a conversation.
    """

    text: str
    n_prompt: int
    spans: tuple[Span, ...] = ()


class Conversations:
    """Renders conversations by a tokenizer's chat template.

    Args:
        tokenizer: Has the template.
        message_format: One of ``FORMATS``.
        kwargs: What the template is given besides, and options of ``apply_chat_template``.
        is_continued: Whether a model continues them: the last answer of the assistant is then left
            out, and the text ends where a new one begins.

    Raises:
        UserError: The tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        message_format: str,
        kwargs: Mapping[str, Any],
        *,
        is_continued: bool = False,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"data.messages_column: the tokenizer {tokenizer.name_or_path} has no chat template; "
                "name a file with one in data.chat_template"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"data.messages_column: the tokenizer {tokenizer.name_or_path} does not tell which "
                "characters a token stands for; name a fast one in data.tokenizer.name"
            )
        self._tokenizer = tokenizer
        self._format = message_format
        self._kwargs = dict(kwargs)
        self._ends_with_answer = bool(kwargs.get("continue_final_message"))
        self._is_continued = is_continued
        template = tokenizer.chat_template
        self._template = template if isinstance(template, str) else json.dumps(template)

    def render(self, messages: Any, tools: Any, name: str) -> Rendered:
        """A conversation as text.

        Args:
            messages: As the dataset has them.
            tools: The tools that the assistant may call, as the dataset has them; None for none.
            name: What errors call the conversation.

        Raises:
            UserError: These are no messages, a role is unknown, or the template refuses them.
        """
        known = self._messages_of(messages, name)
        tools = _tools_of(tools, name)
        is_answered = known[-1]["role"] == "assistant" and not self._ends_with_answer
        prompt = known[:-1] if is_answered and len(known) > 1 else known
        if self._is_continued:
            known = prompt
        opens = {"add_generation_prompt": True} if self._is_continued else {}
        options = (opens if not self._ends_with_answer else {}) | self._kwargs
        text = self._apply(known, tools, options, name)
        n_prompt = len(text)
        if len(prompt) < len(known):
            opening = self._apply(prompt, tools, {"add_generation_prompt": True} | self._kwargs, name)
            n_prompt = _common(text, opening)
        spans = self._spans(known, text, lambda changed: self._try(changed, tools, options))
        return Rendered(text, n_prompt, tuple(spans))

    def _messages_of(self, messages: Any, name: str) -> list[Message]:
        """Messages as a template takes them."""
        speaker, content = FORMATS[self._format]
        found = _from_json(messages)
        if not isinstance(found, Sequence) or isinstance(found, str) or not len(found):
            raise UserError(
                f"data.messages_column: {name} has {shortened(messages)}, not a list of messages; mend "
                "or drop the row, or name another column"
            )
        known = []
        for message in found:
            if not isinstance(message, Mapping) or not isinstance(message.get(speaker), str):
                raise UserError(
                    f"data.messages_column: {name} has the message {shortened(message)}, which has no "
                    f"{speaker}; mend or drop the row, or see data.messages_format"
                )
            role = message[speaker]
            if self._format == "sharegpt":
                role = _SHAREGPT_ROLES.get(role, role)
            if role not in _ROLES and f"'{role}'" not in self._template.replace('"', "'"):
                raise UserError(
                    f"data.messages_column: {name} has the role {role!r}, which the chat template does "
                    f"not know; use {', '.join(_ROLES)}, mend or drop the row"
                )
            rest = {key: _given(value) for key, value in message.items() if value is not None}
            del rest[speaker]
            known.append({"role": role, "content": rest.pop(content, None), **rest})
        return known

    def _apply(self, messages: list[Message], tools: Any, options: Mapping[str, Any], name: str) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, **options
            )
        # A template is a program of its own, and fails in any way.
        except Exception as error:
            raise UserError(
                f"data.messages_column: the chat template refuses {name} ({last_line(error)}); mend or "
                "drop the row, or see data.chat_template and data.chat_template_kwargs"
            ) from error
        return text

    def _try(self, messages: list[Message], tools: Any, options: Mapping[str, Any]) -> str | None:
        try:
            return self._apply(messages, tools, options, "")
        except UserError:
            return None

    def _spans(self, messages: list[Message], text: str, render: Any) -> Iterator[Span]:
        """Where the text of each message is: where it changes as the message does.

        A template may strip a message, take it apart or quote it, so that it is not looked for.
        """
        end = 0
        for number, message in enumerate(messages):
            changed = [*messages]
            changed[number] = _replaced(message)
            other = render(changed)
            if other is None or other == text:
                continue
            start = max(end, _common(text, other))
            end = max(start, len(text) - _common(text[start:][::-1], other[::-1]))
            if start < end:
                yield Span(message["role"], start, end)


def _common(first: str, second: str) -> int:
    """Characters with which both begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _replaced(value: Any) -> Any:
    """A value with other words in the place of every text."""
    if isinstance(value, str):
        return _STAND_IN if value else value
    if isinstance(value, Mapping):
        return {key: inner if key in _NO_TEXTS else _replaced(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner) for inner in value]
    return value


def _given(value: Any) -> Any:
    """A value without keys that are null: a column has the keys of all its rows in each."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_given(inner) for inner in value]
    return value


def _tools_of(tools: Any, name: str) -> list[Any] | None:
    found = _given(_from_json(tools))
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise UserError(
            f"data.tools_column: {name} has {shortened(tools)}, not a list of tools; mend or drop the "
            "row, or name another column"
        )
    return found


def _from_json(value: Any) -> Any:
    """A value that some datasets write as JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
