"""Conversations: from messages through chat templates to tokens, roles and files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import write_jsonl
from qk_sniffer import Captures
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.data.conversations import Conversations
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule
from readers import error_line, files_of

Predict = Callable[..., int]
ModelDir = Callable[[str], Path]
DEMO = str(Path(__file__).parents[1] / "src/qk_sniffer/demo/model")

TAGGED = """\
{%- if tools %}<|tools|>{{ tools | tojson }}</|tools|>
{% endif %}
{%- for message in messages %}
{%- set content = message.content or '' %}
{%- if '</think>' in content and not loop.last %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}<|{{ message.role }}|>
{{ content | trim }}
{%- for call in message.tool_calls or [] %}<|call|>{{ call.function | tojson }}{% endfor %}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
"""It strips thoughts from all answers but the last, and has tools."""

BRACKETS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns') }}
{%- endif %}
{%- if message.role == 'user' %}[U] {% if loop.first and system is defined %}({{ system }}) {% endif %}
{{- message.content.strip() }} [/U]
{%- else %} {{ message.content.strip() }}{{ eos_token }}{% endif %}
{%- endfor %}"""
"""It writes the token that begins a text, and the system's message into the first of the user."""

TEMPLATES = {"tagged": TAGGED, "brackets": BRACKETS}

CONVERSATIONS = [
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "<think>It holds values.</think>Sequence"},
        {"role": "user", "content": "  And a dict, in a word?  "},
        {"role": "assistant", "content": "<think>It maps.</think>Mapping"},
    ],
    [{"role": "user", "content": "Say user, assistant."}],
    [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "a"},
    ],
]
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture(params=["demo", "bytes"])
def tokenizer(
    request: pytest.FixtureRequest, model_dir: ModelDir
) -> tuple[str, PreTrainedTokenizerBase]:
    """One with merges, and one of bytes; with their directories."""
    name = DEMO if request.param == "demo" else str(model_dir("llama"))
    return name, AutoTokenizer.from_pretrained(name)


@pytest.fixture(params=TEMPLATES)
def template(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / f"{request.param}.jinja"
    file.write_text(TEMPLATES[request.param])
    return file


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    rows = [{"id": f"c{i}", "messages": each} for i, each in enumerate(CONVERSATIONS)]
    return write_jsonl(tmp_path / "conversations.jsonl", rows)


def batches(path: Path, name: str, **settings: Any) -> list[Any]:
    """The texts of a file, each a batch."""
    fields = {"messages_column": "messages"} | settings
    data = TextDataModule(str(path), tokenizer=TokenizerConfig(name), **fields)
    data.setup("predict")
    return list(data.predict_dataloader())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("message_format", ["messages", "sharegpt"])
def test_tokens_are_those_of_apply_chat_template(
    tokenizer: tuple[str, PreTrainedTokenizerBase],
    template: Path,
    message_format: str,
    streaming: bool,
    tmp_path: Path,
) -> None:
    """Also without a second token that begins the text, and up to the last answer."""
    name, own = tokenizer
    own.chat_template = template.read_text()
    rows: list[dict[str, Any]] = [{"chat": each} for each in CONVERSATIONS]
    if message_format == "sharegpt":
        rows = [
            {"chat": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in each]}
            for each in CONVERSATIONS
        ]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    settings = {"messages_column": "chat", "messages_format": message_format, "streaming": streaming}
    found = batches(file, name, chat_template=str(template), **settings)
    for batch, messages in zip(found, CONVERSATIONS, strict=True):
        whole = own.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert batch["input_ids"][0].tolist() == whole
        assert whole.count(own.bos_token_id) == (template.stem == "brackets")
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        opening = own.apply_chat_template(
            prompt, tokenize=True, add_generation_prompt=prompt is not messages
        )["input_ids"]
        assert batch["n_prompt_tokens"].tolist() == [len(opening)]


def test_every_message_is_where_its_text_is(
    tokenizer: tuple[str, PreTrainedTokenizerBase], template: Path, conversations: Path
) -> None:
    """Messages that a template strips, joins or takes apart, and short ones."""
    name, own = tokenizer
    keeps_thoughts = template.stem == "brackets"
    for batch, messages in zip(
        batches(conversations, name, chat_template=str(template)), CONVERSATIONS, strict=True
    ):
        (spans,) = batch["messages"]
        assert [span["role"] for span in spans] == [message["role"] for message in messages]
        for number, (span, message) in enumerate(zip(spans, messages, strict=True)):
            text = own.decode(batch["input_ids"][0, span["start"] : span["stop"]])
            content = message["content"].strip()
            if not keeps_thoughts and number < len(messages) - 1:
                content = content.split("</think>")[-1]
            # A token may hold a character of the template before or behind the text.
            assert content in text and len(text) <= len(content) + 2


MOVING = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{%- if loop.last and system is defined %}[U] {{ system }} {{ message.content }}[/U]
{%- else %}[U] {{ message.content }}[/U]{% endif %}
{%- else %} {{ message.content }}|{% endif %}
{%- endfor %}"""
"""It writes the system's message into the last of the user, where that is the last of all."""


def said(messages: list[dict[str, Any]], template: str) -> tuple[list[tuple[str, str]], str]:
    """Roles and texts of the messages of a conversation, and what follows the prompt."""
    own = AutoTokenizer.from_pretrained(DEMO)
    own.chat_template = template
    found = Conversations(own, "messages", {}).render(messages, None, "row 0")
    spans = [(span.role, found.text[span.start : span.stop]) for span in found.spans]
    return spans, found.text[found.n_prompt :]


def test_a_message_that_a_template_moves_hides_no_other() -> None:
    system = {"role": "system", "content": "Be terse."}
    turns = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "What is two?"},
    ]
    spans, _ = said([system, *turns], MOVING)
    assert spans == [
        ("user", "Hello there"),
        ("assistant", "Good day"),
        ("system", "Be terse."),
        ("user", "What is two?"),
    ]
    answer = {"role": "assistant", "content": "Two is two."}
    spans, answered = said([system, *turns, answer], MOVING)
    assert spans[-1] == ("assistant", "Two is two.")
    assert answered == "Two is two.|"


def test_a_message_that_looks_like_the_template_s_own_text_is_found() -> None:
    """A template may write an answer otherwise that comes before such a message."""
    looking = TAGGED.replace("not loop.last", "not loop.last and messages[-1].content[0] != '<'")
    messages = [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": "<think>So.</think>Done"},
        {"role": "user", "content": "<found>x</found>"},
    ]
    spans, _ = said(messages, looking)
    assert spans == [(m["role"], m["content"]) for m in messages]


def test_numbers_of_a_tool_call_are_of_the_message() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, True]}}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    spans, _ = said(messages, TAGGED)
    assert spans[1][0] == "assistant"
    assert spans[1][1].startswith("add") and '"b": [2, true]' in spans[1][1]


def test_tools_and_what_null_keys_stand_for(tmp_path: Path) -> None:
    """A column has the keys of all messages in each; tools may be a list, or JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    own = AutoTokenizer.from_pretrained(DEMO)
    own.chat_template = TAGGED
    whole = own.apply_chat_template(messages, tools=tools, tokenize=True)["input_ids"]
    template = tmp_path / "template.jinja"
    template.write_text(TAGGED)
    for tools_column in (tools, json.dumps(tools)):
        rows = [{"messages": messages, "tools": tools_column}]
        file = write_jsonl(tmp_path / f"{type(tools_column).__name__}.jsonl", rows)
        (batch,) = batches(file, DEMO, chat_template=str(template), tools_column="tools")
        assert batch["input_ids"][0].tolist() == whole
        assert [span["role"] for span in batch["messages"][0]] == ["user", "assistant", "tool"]


def test_the_template_is_given_what_the_config_says(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TAGGED)
    own = AutoTokenizer.from_pretrained(DEMO)
    own.chat_template = TAGGED
    file = write_jsonl(tmp_path / "one.jsonl", [{"messages": CONVERSATIONS[1]}])
    kwargs = {"enable_thinking": False, "add_generation_prompt": True}
    (batch,) = batches(file, DEMO, chat_template=str(template), chat_template_kwargs=kwargs)
    whole = own.apply_chat_template(CONVERSATIONS[1], tokenize=True, **kwargs)["input_ids"]
    assert batch["input_ids"][0].tolist() == whole
    assert own.decode(whole).endswith("<think></think>")


def test_a_cut_conversation_has_the_messages_that_are_left(tmp_path: Path, conversations: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(BRACKETS)
    data = TextDataModule(
        str(conversations),
        messages_column="messages",
        chat_template=str(template),
        tokenizer=TokenizerConfig(DEMO, max_length=8),
    )
    data.setup("predict")
    for batch in data.predict_dataloader():
        assert batch["sequence_lengths"].tolist() == [8] and batch["truncated"] == [True]
        assert batch["n_prompt_tokens"].tolist() == [8]
        assert all(span["stop"] <= 8 for span in batch["messages"][0])


def test_files_say_who_speaks(
    predict: Predict, tmp_path: Path, template: Path, conversations: Path
) -> None:
    """In the table of texts, for each row of a head, and the same in batches and alone."""
    data = {"path": str(conversations), "messages_column": "messages", "chat_template": str(template)}
    for root, batch_size in (("root", 3), ("alone", 1)):
        assert predict(root, data=data | {"batch_size": batch_size}) == 0
    root = tmp_path / "root"
    assert (root / "examples/data.parquet").read_bytes() == (
        tmp_path / "alone/examples/data.parquet"
    ).read_bytes()
    captures = Captures(root)
    texts = {row["source_id"]: row for row in captures.examples.to_pylist()}
    assert list(captures.examples.column_names)[-2:] == ["n_prompt_tokens", "messages"]
    frame = captures.head(0, 1).pandas()
    for source_id, rows in frame.groupby("source_id"):
        expected = np.full(texts[source_id]["n_tokens"], None)
        for span in texts[source_id]["messages"]:
            expected[span["start"] : span["stop"]] = span["role"]
        found = [role if isinstance(role, str) else None for role in rows["role"]]
        assert found == expected.tolist()
    assert predict("root", data=data | {"chat_template_kwargs": {"x": 1}}) == 2


def test_a_template_that_has_changed_is_not_mixed_with_another(
    predict: Predict,
    tmp_path: Path,
    template: Path,
    conversations: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"path": str(conversations), "messages_column": "messages", "chat_template": str(template)}
    assert predict(data=data | {"max_samples": 1}) == 0
    template.write_text(template.read_text() + "!")
    capsys.readouterr()
    assert predict(data=data) == 2
    assert "data.chat_template.text" in error_line(capsys)


def test_a_run_of_texts_has_no_more_columns_than_before(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    table = pq.read_table(tmp_path / "root/examples/data.parquet")
    assert table.column_names == ["example_id", "source_id", "n_tokens", "truncated"]
    settings = json.loads((tmp_path / "root/manifest.json").read_text())["settings"]
    assert not {"messages_column", "messages_format", "tools_column"} & settings["data"].keys()
    assert "add_special_tokens" not in settings["data"]["tokenizer"]
    assert "generate" not in settings["model"]
    with pytest.raises(UserError, match="l00h00q: its texts are no conversations"):
        Captures(tmp_path / "root").head(0, 0).roles()


@pytest.mark.parametrize("added", [None, False])
def test_a_text_with_two_beginnings_gets_a_warning(
    predict: Predict, tmp_path: Path, caplog: pytest.LogCaptureFixture, added: bool | None
) -> None:
    """The demo's tokenizer begins each text; a text may have that token already."""
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "A"}, {"text": "<|bos|>A list"}])
    data = {"path": str(file), "id_column": None}
    tokenizer = {"name": DEMO} | ({} if added is None else {"add_special_tokens": added})
    assert predict(model={"name": DEMO}, data=data | {"tokenizer": tokenizer}) == 0
    warned = [line for line in caplog.messages if "add_special_tokens" in line]
    assert len(warned) == (added is None)
    n_tokens = Captures(tmp_path / "root").examples["n_tokens"].to_pylist()
    assert n_tokens == ([2, 4] if added is None else [1, 3])


MISTAKES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no template": ({}, CONVERSATIONS[0], "has no chat template"),
    "no file": (
        {"chat_template": "absent.jinja"},
        CONVERSATIONS[0],
        "data.chat_template: absent.jinja",
    ),
    "no list": ({"template": TAGGED}, "Hello", "row 1 (id 'b') has 'Hello', not a list of messages"),
    "an empty list": ({"template": TAGGED}, [], "row 1 (id 'b') has [], not a list of messages"),
    "no role": ({"template": TAGGED}, [{"content": "Hi"}], "which has no role"),
    "an unknown role": (
        {"template": TAGGED},
        [{"role": "narrator", "content": "Hi"}],
        "row 1 (id 'b') has the role 'narrator'",
    ),
    "a template that fails": (
        {"template": BRACKETS},
        [{"role": "assistant", "content": "Hi"}],
        "refuses row 1 (id 'b') (user and assistant must take turns)",
    ),
    "no Jinja": ({"template": "{% for %}"}, CONVERSATIONS[0], "data.chat_template: the chat template"),
    "an argument of ours": (
        {"template": TAGGED, "chat_template_kwargs": {"tokenize": True}},
        CONVERSATIONS[0],
        "data.chat_template_kwargs.tokenize: the run gives it itself",
    ),
    "no tools": ({"template": TAGGED, "tools_column": "id"}, CONVERSATIONS[0], "not a list of tools"),
    "no such column": (
        {"template": TAGGED, "messages_column": "chats"},
        CONVERSATIONS[0],
        "data.messages_column: the dataset has no column 'chats'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    settings, messages, message = MISTAKES[mistake]
    first = CONVERSATIONS[1] if isinstance(messages, list) else "[]"
    rows = [{"id": "a", "messages": first}, {"id": "b", "messages": messages}]
    if isinstance(messages, str):
        rows = [{"id": "a", "messages": json.dumps(CONVERSATIONS[1])}, rows[1]]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    data = {"path": str(file), "messages_column": "messages"} | settings
    if "template" in data:
        template = tmp_path / "template.jinja"
        template.write_text(data.pop("template"))
        data["chat_template"] = str(template)
    assert predict(data=data) == 2
    assert message in error_line(capsys)
    assert files_of(tmp_path / "root") == {}


def test_fields_of_conversations_need_their_column() -> None:
    with pytest.raises(UserError, match=r"data\.tools_column: only conversations"):
        TextDataModule("texts.jsonl", tools_column="tools")


def test_a_template_with_the_date_of_today_gets_a_warning(
    tmp_path: Path, conversations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + TAGGED)
    batches(conversations, DEMO, chat_template=str(template))
    assert "another day" in caplog.text
    caplog.clear()
    kwargs = {"date_string": "26 Jul 2024"}
    batches(conversations, DEMO, chat_template=str(template), chat_template_kwargs=kwargs)
    assert "another day" not in caplog.text


def test_conversations_in_memory(conversations: Path) -> None:
    own = AutoTokenizer.from_pretrained(DEMO)
    own.chat_template = TAGGED
    dataset = datasets.load_dataset("json", data_files=str(conversations), split="train")
    data = TextDataModule.of(dataset, own, messages_column="messages", id_column="id")
    data.setup("predict")
    assert next(iter(data.predict_dataloader()))["source_ids"] == ["c0"]
    assert SnifferModule(DEMO).max_new_tokens == 0
