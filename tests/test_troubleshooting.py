"""docs/troubleshooting.md explains every message of a ``UserError``, and quotes none that is gone."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HOLE = "…"
MESSAGE_OF = {"UserError": 0, "_require": 1, "explained_loading": 0}
"""Which argument is the message, by the function that raises it."""


def quoted() -> list[str]:
    """The messages in the first column of the page's tables."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (?:``(.*?)``|`(.*?)`) \|", page, re.MULTILINE)
    return [double or single for double, single in cells]


def source_texts() -> Iterator[tuple[str, str, bool]]:
    """Every text of the package: its place, what it says, and whether a ``UserError`` is made of it."""
    trees = {path: ast.parse(path.read_text()) for path in (REPOSITORY / "src").rglob("*.py")}
    shared = {
        name: text
        for tree in trees.values()
        for name, text in constants(tree).items()
        if name.isupper()
    }
    for path, tree in trees.items():
        names = shared | constants(tree)
        messages = [
            node.args[MESSAGE_OF[node.func.id]]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in MESSAGE_OF
        ]
        for node in ast.walk(tree):
            text = re.sub(f"{HOLE}( {HOLE})+", HOLE, filled(node, names))
            if re.search(r"\w", text):
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", text, node in messages


def constants(tree: ast.Module) -> dict[str, str]:
    """Names that stand for one text in all of a module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, set()).add(filled(node.value, {}))
    return {name: text for name, (text, *others) in found.items() if not others and HOLE not in text}


def filled(node: ast.AST, names: Mapping[str, str]) -> str:
    """The text of an expression, with holes for what is only known when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"\{\d?\}|%[\w.]+", HOLE, text)
        case ast.JoinedStr(values=parts):
            return "".join(filled(part, names) for part in parts)
        case ast.FormattedValue(value=value):
            return filled(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return filled(left, names) + filled(right, names)
        case ast.Name(id=name):
            return names.get(name, HOLE)
    return HOLE


TEXTS = list(source_texts())


def test_every_message_is_explained() -> None:
    messages = [(place, text) for place, text, is_message in TEXTS if is_message]
    assert len(messages) > 80
    patterns = quoted()
    missing = [
        f"{place}: {text}"
        for place, text in messages
        if not any(pattern in text for pattern in patterns)
    ]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)


def test_every_quoted_message_can_occur() -> None:
    gone = [pattern for pattern in quoted() if not any(pattern in text for _, text, _ in TEXTS)]
    assert not gone


def test_no_message_is_quoted_twice() -> None:
    assert len(quoted()) == len(set(quoted()))
