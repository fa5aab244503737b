"""The card of main: which branches a dataset has, and what each of them holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from qk_sniffer.hub.branch import Branch
from qk_sniffer.storage import Place, compose_card, count_rows, load_argument, shown_names


def render_index(runs: Sequence[tuple[Branch, Mapping[str, Any]]], existing: str | None) -> str:
    """The card of main.

    Args:
        runs: The branches that hold a run, and its manifest; at least one.
        existing: The card that is there, whose own text and fields stay.

    Raises:
        UserError: The YAML of the existing card is broken.
    """
    lines = ["| branch | model | text | examples | heads | rows |", "|---|---|---|---|---|---|"]
    for branch, manifest in runs:
        numbers = (manifest["examples"]["rows"], len(manifest["heads"]), count_rows(manifest))
        counts = " | ".join(f"{number:,}" for number in numbers)
        names = " | ".join(f"`{name}`" for name in shown_names(manifest["settings"]))
        lines.append(f"| [{branch.name}]({branch.url}) | {names} | {counts} |")
    first, manifest = runs[0]
    place = Place(first.repo_id, first.name)
    head = load_argument(manifest, next(iter(manifest["heads"])))
    return compose_card(
        existing,
        {},
        f"""\
# Queries and keys of attention heads

Each branch holds the query and key vectors of one model, a file for each head:

```python
from datasets import load_dataset

head = {place.load_line(head)}
```

{chr(10).join(lines)}
""",
    )
