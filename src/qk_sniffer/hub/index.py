"""The card of main: which branches a dataset has, and what each of them holds."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.storage import Place, compose_card


def render_index(repo_id: str, runs: Mapping[str, Mapping[str, Any]], existing: str | None) -> str:
    """The card of main.

    Args:
        repo_id: The dataset.
        runs: The manifest of each branch that holds a run.
        existing: The card that is there, whose own text and fields stay.

    Raises:
        UserError: The YAML of the existing card is broken.
    """
    lines = ["| branch | model | text | examples | heads | rows |", "|---|---|---|---|---|---|"]
    for branch in sorted(runs):
        manifest = runs[branch]
        settings, heads = manifest["settings"], manifest["heads"]
        model, text = settings["model"].get("name"), settings["data"].get("path")
        rows = sum(head["rows"] for head in heads.values())
        link = f"[{branch}](https://huggingface.co/datasets/{repo_id}/tree/{branch})"
        counts = f"{manifest['examples']['rows']:,} | {len(heads):,} | {rows:,}"
        lines.append(f"| {link} | `{model}` | `{text}` | {counts} |")
    first = next(iter(sorted(runs)), "BRANCH")
    head = next(iter(runs[first]["heads"]), "l00h00q") if runs else "l00h00q"
    return compose_card(
        existing,
        {},
        f"""\
# Queries and keys of attention heads

Each branch holds the query and key vectors of one model, a file for each head:

```python
from datasets import load_dataset

head = {Place(repo_id, first).load_line(head)}
```

{chr(10).join(lines)}
""",
    )
