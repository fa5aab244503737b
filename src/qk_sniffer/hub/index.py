"""The card of main: which branches a dataset has, and what each of them holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from qk_sniffer.hub.branch import Branch
from qk_sniffer.storage import (
    Place,
    captured_names,
    compose_card,
    count_rows,
    first_directory,
    load_argument,
    shown_names,
)


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
        numbers = (manifest["examples"]["rows"], len(captured_names(manifest)), count_rows(manifest))
        counts = " | ".join(f"{number:,}" for number in numbers)
        names = " | ".join(f"`{name}`" for name in shown_names(manifest["settings"]))
        lines.append(f"| [{branch.name}]({branch.url}) | {names} | {counts} |")
    first, manifest = next((run for run in runs if run[1]["heads"]), runs[0])
    place = Place(first.repo_id, first.name)
    shown = "head" if manifest["heads"] else "moments"
    argument = load_argument(manifest, first_directory(manifest))
    return compose_card(
        existing,
        {},
        f"""\
# Queries and keys of attention heads

Each branch holds the query and key vectors of one model, a file for each head:

```python
from datasets import load_dataset

{shown} = {place.load_line(argument)}
```

{chr(10).join(lines)}
""",
    )
