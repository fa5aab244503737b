"""Every causal language model of transformers, captured and compared with its own attention.

Continuous integration runs a dozen; ``make test-architectures`` runs all.
"""

import pytest
import transformers

from examine import TABLE, examine, read_table
from tiny import ARCHITECTURES

DOZEN = {
    "bloom",
    "deepseek_v3",
    "falcon",
    "gemma3",
    "glm4",
    "gpt_oss",
    "jamba",
    "llama",
    "llama4",
    "phi",
    "qwen2",
    "smollm3",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in DOZEN else pytest.mark.every_architecture)
        for name in ARCHITECTURES
    ],
)
def test_an_architecture_is_captured_as_the_table_says(name: str) -> None:
    assert str(examine(name)) == read_table()[name]


def test_the_table_has_every_architecture() -> None:
    version = TABLE.read_text().partition("of transformers ")[2].partition(",")[0]
    if transformers.__version__ != version:
        pytest.skip(f"the table is about transformers {version}")
    rows = read_table()
    assert set(ARCHITECTURES) == set(rows) - {"Architecture"}
    assert sum("| exact" in row for row in rows.values()) >= 175
