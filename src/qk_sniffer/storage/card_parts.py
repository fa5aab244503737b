"""The parts of a dataset card: its YAML, a person's own text, and what is generated between two marks.

A person's text around the marks and their fields in the YAML stay when a card is written anew.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.storage.schema import CARD_FILE

_BEGIN = "<!-- qk-sniffer begin: text up to the end mark is written anew, write yours outside -->"
_END = "<!-- qk-sniffer end -->"

_GENERATED = ("size_categories", "configs")
_TAGS = ("attention", "interpretability", "qk-sniffer")
_LICENSE = {"license": "other", "license_name": "terms-of-model-and-dataset"}

_YAML_BLOCK = re.compile(r"\A\s*---\r?\n(.*?\r?\n)?---[ \t]*(\r?\n|\Z)", re.DOTALL)
# A card lists a config for each of perhaps a thousand heads, which takes PyYAML's own parser seconds.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def read_card(path: Path) -> str:
    """The text of a card.

    Raises:
        UserError: It is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(
            f"{CARD_FILE}: not in UTF-8 ({first_line(error)}); save it in that encoding, or remove the "
            "file to have it written anew"
        ) from error


def compose_card(existing: str | None, fields: Mapping[str, Any], generated: str) -> str:
    """A card with new generated fields and text, that keeps what a person has added.

    Args:
        existing: The card that is there; one without marks is all a person's own.
        fields: What the YAML is to say besides a licence and tags: ``size_categories``, ``configs``.
        generated: The text between the marks.

    Raises:
        UserError: The YAML of the existing card is broken.
    """
    data, text = _split(existing or "")
    if "license" not in data:
        data |= _LICENSE
    tags = data.get("tags") or []
    data["tags"] = [*dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *_TAGS])]
    data |= fields
    before, after = _own_text(text)
    parts = (before, f"{_BEGIN}\n\n{generated.strip()}\n\n{_END}", after)
    front_matter = yaml.dump(data, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)
    return f"---\n{front_matter}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def own_part(card: str) -> str:
    """The fields and the text that a person has added to a card, to compare; empty where none.

    Raises:
        UserError: The YAML of the card is broken.
    """
    data, text = _split(card)
    plain = {"tags": [*_TAGS], **_LICENSE}
    own = {
        name: value
        for name, value in data.items()
        if name not in _GENERATED and value != plain.get(name)
    }
    own_text = _own_text(text)
    return json.dumps([own, own_text], sort_keys=True, default=str) if own or any(own_text) else ""


def _own_text(text: str) -> tuple[str, str]:
    """What a person wrote before and behind the generated part.

    Where they have cut the end mark away, what follows can't be told from the generated part.
    """
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return before.strip(), after.strip()


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The fields of a card's YAML, and its text."""
    block = _YAML_BLOCK.match(card)
    if block is None:
        return {}, card
    try:
        fields = dict(yaml.load(block[1] or "{}", Loader=_LOADER) or {})
        # What is no JSON can't be compared: names of two types, or a list that holds itself.
        json.dumps(fields, sort_keys=True, default=str)
        tags = fields.get("tags") or []
        if not isinstance(tags, str) and not all(isinstance(tag, str) for tag in tags):
            raise ValueError("tags are not names")
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{CARD_FILE}: the YAML between its --- lines is broken ({reason}); mend it, or remove the "
            "file to have it written anew"
        ) from error
    return fields, card[block.end() :]
