"""Conversations as text: rendered by a chat template, with the place of each message."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateSyntaxError
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

_OWN_ARGUMENTS = ("conversation", "messages", "tools", "tokenize", "chat_template")
"""What a template or ``apply_chat_template`` is given by us."""

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
        reserved = next((name for name in _OWN_ARGUMENTS if name in kwargs), None)
        if reserved is not None:
            raise UserError(
                f"data.chat_template_kwargs.{reserved}: the run gives it itself; leave it out, or see "
                "the other fields of data"
            )
        self._tokenizer = tokenizer
        self._format = message_format
        self._kwargs = dict(kwargs)
        self._ends_with_answer = bool(kwargs.get("continue_final_message"))
        self._is_continued = is_continued
        self._template = template_text(tokenizer.chat_template)

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
        spans = self._spans(known, text, lambda changed: self._try(changed, tools, options))
        n_prompt = len(text)
        if len(prompt) < len(known):
            opening = self._try(prompt, tools, {"add_generation_prompt": True} | self._kwargs)
            # Some templates write the last question otherwise where an answer follows.
            begins = opening is not None and text.startswith(opening)
            n_prompt = len(opening or "") if begins else spans[-1].start if spans else len(text)
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
                    f"not name; use {', '.join(_ROLES)}, mend or drop the row"
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
        except TemplateSyntaxError as error:
            raise UserError(
                f"data.chat_template: the chat template is no Jinja (line {error.lineno}: {error}); "
                "mend it, or name another file"
            ) from error
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

    def _spans(
        self, messages: list[Message], text: str, render: Callable[[list[Message]], str | None]
    ) -> list[Span]:
        """Where the text of each message is, in the order of the text; a template may move one."""
        found = []
        for number, message in enumerate(messages):

            def with_changed(changed: Message, number: int = number) -> str | None:
                return render([*messages[:number], changed, *messages[number + 1 :]])

            place = _place_of_words(message, text, with_changed) or _place_of_changes(
                message, text, with_changed
            )
            if place is not None:
                found.append(Span(message["role"], *place))
        spans: list[Span] = []
        for span in sorted(found, key=lambda span: (span.start, span.stop)):
            start = max(span.start, spans[-1].stop if spans else 0)
            if start < span.stop:
                spans.append(replace(span, start=start))
        return spans


_Render = Callable[[Message], str | None]
"""The conversation with a message in place of the one that is looked for."""


def _place_of_words(message: Message, text: str, render: _Render) -> tuple[int, int] | None:
    """Where the content of a message stands as it is; None where a template changes it.

    A character in its middle shows the place, and leaves its ends as they are, to which a template may
    look.
    """
    content = message.get("content")
    if not isinstance(content, str) or not (words := content.strip()) or len(message) > 2:
        return None
    before = len(content) - len(content.lstrip())
    middle = before + len(words) // 2
    other = render(message | {"content": content[:middle] + _STAND_IN + content[middle:]})
    if other is None or other == text:
        return None
    start = _common(text, other) - (middle - before)
    is_there = start >= 0 and text.startswith(words, start)
    return (start, start + len(words)) if is_there else None


def _place_of_changes(message: Message, text: str, render: _Render) -> tuple[int, int] | None:
    """Where the text changes when all that the message says does; None where it does not."""
    other = render(_replaced(message))
    if other is None or other == text:
        return None
    start = _common(text, other)
    return start, max(start, len(text) - _common(text[start:][::-1], other[::-1]))


def template_text(chat_template: str | dict[str, str]) -> str:
    """A tokenizer's chat template, or all that it has, as one text."""
    return chat_template if isinstance(chat_template, str) else json.dumps(chat_template)


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
    """A value with other words in the place of all that is said."""
    if isinstance(value, str):
        return _STAND_IN if value else value
    if isinstance(value, int | float):
        return _STAND_IN
    if isinstance(value, Mapping):
        return {
            key: inner
            if key in _NO_TEXTS
            else {_STAND_IN: _STAND_IN}
            if key == "arguments" and isinstance(inner, Mapping)
            else _replaced(inner)
            for key, inner in value.items()
        }
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
