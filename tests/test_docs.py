"""The documentation is built strictly, agrees with the code, and is readable without a network."""

import html
import inspect
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import lightning.pytorch as pl
import pyarrow as pa
import pytest
import yaml

import generate
from qk_sniffer.cli import main
from qk_sniffer.ids import example_id
from qk_sniffer.storage.schema import examples_schema, head_schema, moment_schema

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")]
}


class Page(HTMLParser):
    """The ids of a built page, what it links to, and what a browser loads to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif "href" in values and values.get("rel") != "canonical":
            self.loaded.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return directory


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.glob("*.html") if path.name != "404.html"}
    assert len(pages) > 10
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.exists() or (fragment and fragment not in pages[target].ids):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_the_site_needs_no_network(site: Path) -> None:
    loaded = [link for path in site.glob("*.html") for link in Page(path).loaded]
    assert len(loaded) > 10
    assert not [link for link in loaded if link.startswith(("http", "//"))]
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text()), path


def test_nothing_in_the_text_is_taken_for_a_tag() -> None:
    code = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
    texts = {page: code.sub("", text) for page, text in PAGES.items()}
    assert not [(page, tag) for page, text in texts.items() for tag in re.findall(r"<\w+>", text)]


def test_generated_files_are_those_of_the_code() -> None:
    for file, text in generate.pages().items():
        assert file.read_text() == text, f"{file} is old: run make docs"


def test_the_reference_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--model.name=m", "--data.path=p", "--sniffer.output.data_root=r"]
    sampling = "--sniffer.capture.head_sampling.count=1"
    with pytest.raises(SystemExit):
        main(["predict", *required, sampling, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    expected = {name for section in ("model", "data", "sniffer") for name in leaves(config, section)}
    documented = set(
        re.findall(r"^\| `((?:model|data|sniffer)\..*?)` \|", PAGES["docs/config.md"], re.M)
    )
    assert documented - {"sniffer.capture.head_sampling"} == expected


def leaves(config: dict, name: str) -> list[str]:
    value = config
    for key in name.split("."):
        value = value[key]
    if not isinstance(value, dict):
        return [name]
    return [leaf for key in value for leaf in leaves(config, f"{name}.{key}")]


def test_fields_that_the_pages_name_exist() -> None:
    known = {field.name for members in generate.all_fields().values() for field in members}
    known |= {f"trainer.{name}" for name in inspect.signature(pl.Trainer).parameters}
    sections = {name.rpartition(".")[0] for name in known}
    mappings = tuple(f"model.{name}." for name in ("config_overrides", "quantization", "generate"))
    field = re.compile(r"`((?:model|data|sniffer|trainer)\.[a-z_.]*[a-z_])(?<!\.py)[`:,]")
    assert not [
        f"{page}: {name}"
        for page, name in named(field)
        if name not in known | sections and not name.startswith(mappings)
    ]


def named(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    return [(page, name) for page, text in PAGES.items() for name in pattern.findall(text)]


def test_files_that_the_pages_name_exist() -> None:
    path = re.compile(r"`((?:src|tests|docs|configs|notebooks)/[\w./-]+)`")
    assert not [(page, name) for page, name in named(path) if not (REPOSITORY / name).exists()]
    folders = [REPOSITORY / name for name in ("src", "tests", "docs")]
    modules = {file.name for folder in folders for file in folder.rglob("*.py")}
    assert not [(page, name) for page, name in named(re.compile(r"`(\w+\.py)`")) if name not in modules]


def test_commands_that_the_pages_name_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    target = re.compile(r"[`\n]make ([a-z-]+)")
    assert not [(page, name) for page, name in named(target) if name not in targets]
    commands = re.findall(r"^## ([a-z-]+)$", PAGES["docs/commands.md"], re.MULTILINE)
    command = re.compile(r"[`\n/]qk-sniffer ([a-z][a-z-]*)")
    assert not [(page, name) for page, name in named(command) if name not in commands]


def test_the_columns_are_those_of_the_files() -> None:
    types = "int32|int64|float32|float64|string|bool|fixed_size_list.*?|list.*?"
    rows = re.findall(rf"^\| `(\w+)` \| ({types}) \|", html.unescape(PAGES["docs/files.md"]), re.M)
    settings = {"data": {"messages_column": "chat"}, "model": {"generate": {}}}
    moments = [*moment_schema("q", [3], cross=True)]
    fields = [*head_schema(7, softmax=True), *moments, *examples_schema(settings)]
    named = {
        "vector": "fixed_size_list<float32>[head_dim]",
        "messages": "list<struct<role, start, stop>>",
        "generated_ids": "list<int32>",
    }
    short = {pa.float32(): "float32", pa.float64(): "float64"}
    named |= {f.name: short[f.type] for f in fields if f.type in short}
    sizes = {3: "D", 9: "D²"}
    named |= {
        f.name: f"fixed_size_list<float64>[{sizes[f.type.list_size]}]"
        for f in moments
        if pa.types.is_fixed_size_list(f.type)
    }
    assert rows == [(f.name, named.get(f.name, str(f.type))) for f in fields]


def test_the_documented_ids_are_those_of_the_code() -> None:
    block = re.search(r"```python\n(import hashlib.*?)```", PAGES["docs/files.md"], re.DOTALL)
    assert block is not None
    names: dict = {}
    exec(block[1], names)
    for source_id in (0, -(2**31), 2**31 - 1, 2**31, 10**12, "", "7", "doc-12", "é"):
        assert names["example_id"](source_id) == example_id(source_id)


def test_the_changelog_has_the_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert re.search(rf"^## .*\b{re.escape(project['version'])}$", PAGES["CHANGELOG.md"], re.MULTILINE)
