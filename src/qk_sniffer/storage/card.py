"""The dataset card: the YAML that lets datasets load a head by name, and a page for a reader."""

from typing import Any

from huggingface_hub import DatasetCardData

from qk_sniffer.storage.schema import DATA_FILE, EXAMPLES_DIRECTORY

_SCHEMA_TABLE = """\
| column | type | meaning |
|---|---|---|
| bucket | int32 | bucket of the position |
| example_id | int32 | the text, see `examples` |
| position | int32 | absolute token position, from 0 |
| vector | fixed_size_list<float32> | the head's query or key |
| sliding_window | int32 | the layer's window; null attends to all earlier tokens |
| token_str | string | the token at the position, where captured |"""


def render_card(manifest: dict[str, Any]) -> str:
    """The card of a data root, from its manifest."""
    files = manifest["heads"] | {EXAMPLES_DIRECTORY: manifest["examples"]}
    front_matter = DatasetCardData(
        tags=["attention", "interpretability", "qk-sniffer"],
        configs=[
            {
                "config_name": name,
                "data_files": [{"split": "train", "path": f"{name}/{DATA_FILE}"}],
                # load_dataset caches a local directory under its base name and these configs alone:
                # without the digest it would serve the rows of an older or a namesake data root.
                "description": f"XXH3 {file['xxh3_128']}",
            }
            for name, file in files.items()
        ],
    ).to_yaml()
    return f"---\n{front_matter}\n---\n\n{_body(manifest)}"


def _body(manifest: dict[str, Any]) -> str:
    settings = manifest["settings"]
    model, data, capture = settings["model"], settings["data"], settings["capture"]
    name, sampler = model.get("name", "a causal language model"), capture["sampler"]
    rope = "before" if capture["capture_pre_rope"] else "after"
    partial = "" if manifest["complete"] else "The run was interrupted: this is part of its texts.\n\n"
    first_head = next(iter(manifest["heads"]))
    notes = _notes(manifest["notes"])
    rows = sum(head["rows"] for head in manifest["heads"].values())
    return f"""\
# Queries and keys of {name}

Query (`q`) and key (`k`) vectors of the attention heads of `{name}` while it read text from
`{data.get("path")}`, {rope} the rotary embedding where the model has one.

{partial}{notes}- model: `{name}`, revision `{model.get("revision")}`, dtype `{model.get("dtype")}`
- text: `{data.get("path")}`, split `{data.get("split")}`, {manifest["examples"]["rows"]} examples
- positions: sampler `{sampler["type"]}`, base rate {sampler["base_rate"]}, buckets from
  {capture["min_bucket_size"]}, seed {sampler["seed"]}
- {len(manifest["heads"])} heads, {rows} rows

## Load

```python
from datasets import load_dataset

head = load_dataset("PATH_OR_REPO", "{first_head}", split="train")
```

`l00h05q` is query head 5 of layer 0, `l00h01k` its key head 1; with grouped-query attention key heads
are counted by themselves. `examples` maps `example_id` to the ids of the dataset.

## Columns

{_SCHEMA_TABLE}

Rows are sorted by `example_id` and `position`. `manifest.json` has settings, versions and checksums.
"""


def _notes(notes: list[str]) -> str:
    if not notes:
        return ""
    return (
        "What the vectors leave out or hold beyond the plain case:\n\n"
        + "".join(f"- {note}\n" for note in notes)
        + "\n"
    )
