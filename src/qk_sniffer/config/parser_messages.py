"""What the parser of the config says in several lines, as one line with field and remedy."""

import re
from collections.abc import Collection

from qk_sniffer.errors import nearest

HELP = "`qk-sniffer predict --help` lists the fields"
"""The remedy where there is no better one."""

_ORIGINAL = r"does not accept option '((?:dataset|inference)\..+)'"
"""Of sections that a config of the original scripts has, and one of ours has not."""

_MISSPELT = (
    (r"does not accept option '(.+)'", "", "{}: no such key; {}"),
    (r'Parser key "(.+?)":.*Option \'(.+?)\' is not accepted', "", "{}: no such key; {}"),
    (r"unrecognized arguments: --([^\s=]+)", "--", "{}: no such option; {}"),
)
_SET_IT = "set it in the config file or as an option"
_EXPLANATIONS = (
    (r"unrecognized arguments: (\S+\.ya?ml)", "{0}: give a config file as --config {0}"),
    (
        r"unrecognized arguments: (\S+\.(?:jsonl?|csv|tsv|parquet|txt))",
        "{}: no such argument; put a pattern of files in quotes, as in --data.path '*.jsonl'",
    ),
    (r"unrecognized arguments: (\S+)", "{}: no such argument; " + HELP),
    (r'Parser key "(.+?)":.*arguments are required: (\S+)', "{}.{}: required; " + _SET_IT),
    (r"arguments are required: (.+)", "{}: required; " + _SET_IT),
    (r"^argument (?:-c/)?(\S+): (.+)", "{}: {}; " + HELP),
    (
        r'Parser key "(.+?)":\s*Unable to load config \'(.*?)\'',
        "{0}: expected a section, got {1}; give its fields one by one, as in --{0}.FIELD VALUE",
    ),
    (
        r'Parser key "(.+?)":.*Parser key "(.+?)":\s*Expected an? (.+?)\. Got value: (.*?)\n',
        "{}.{}: expected {}, got {}; " + HELP,
    ),
    (
        r'Parser key "(.+?)":.*Problem with given class_path \'(.+?)\':\s*(.+?)\n',
        "{}: {} can't be used ({}); mend its name or its arguments",
    ),
    (
        r'Parser key "(.+?)":.*Subtypes: \[(list\[.+?)\]\n.*Given value: (\d+(?:[, ]+\d+)*)$',
        "{0}: expected one of {1}, got {2}; write [{2}]",
    ),
    (
        r'Parser key "(.+?)":.*Subtypes: \[(.+?)\]\n.*Given value: (.*)',
        "{}: expected one of {}, got {}; " + HELP,
    ),
    (
        r'Parser key "(.+?)":\s*Expected an? (.+?)\. Got value: (.*)',
        "{}: expected {}, got {}; " + HELP,
    ),
    (r'Parser key "config":(.*)', "--config: {}"),
    (r"Problems parsing config: (.*)", "--config: not valid YAML: {}"),
)


def explain(message: str, fields: Collection[str]) -> str:
    """One line with field and remedy for what jsonargparse says in several.

    Args:
        message: The text of an ``ArgumentError``.
        fields: The fields of the config, such as ``data.path``.
    """
    if found := re.search(_ORIGINAL, message):
        return (
            f"{found[1]}: no such key; if this is a config of the original scripts, convert it with "
            "`qk-sniffer convert-config FILE`"
        )
    for pattern, dashes, template in _MISSPELT:
        if found := re.search(pattern, message, re.DOTALL):
            name = ".".join(found.groups())
            meant = nearest(name, fields)
            remedy = HELP if meant is None else f"did you mean {dashes}{meant}?"
            return template.format(dashes + name, remedy)
    for pattern, template in _EXPLANATIONS:
        if found := re.search(pattern, message, re.DOTALL):
            line = template.format(*(_readable(group) for group in found.groups()))
            return " ".join(line.split())
    return " ".join(message.split())


def _readable(text: str) -> str:
    """Types and keys as a person writes them in YAML."""
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"NestedArg\(key='(.*?)', val='(.*)'\)", r"\1: \2", text)
    text = text.replace("predict.", "").replace("typing.", "").replace("NoneType", "null")
    return re.sub(r"^Literal\[(.*)\]$", r"one of \1", text)
