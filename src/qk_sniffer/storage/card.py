"""The dataset card: the YAML that lets datasets load a head by name, and a page for a reader."""

import glob
import itertools
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from qk_sniffer.config import described
from qk_sniffer.kinds import KINDS, LOCAL_POSITIONS, Kind, kinds_of
from qk_sniffer.storage.card_configs import (
    Place,
    configs_of,
    first_directory,
    has_config_of_each_head,
    layer_config,
    load_argument,
)
from qk_sniffer.storage.card_moments import moments_section
from qk_sniffer.storage.card_parts import compose_card, read_card
from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.manifest import captured_names, count_rows, describe_beyond
from qk_sniffer.storage.reports import report_files
from qk_sniffer.storage.schema import (
    CARD_FILE,
    EXAMPLES_DIRECTORY,
    REPORT_DIRECTORY,
    has_softmax,
    keeps_rows,
)

_SIZES = ("n<1K", *(f"{i}<n<{j}" for i, j in itertools.pairwise(
    ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"))), "n>1T")  # fmt: skip
_MOST_BUCKETS = 24

_SCHEMA_TABLE = """\
| column | type | meaning |
|---|---|---|
| bucket | int32 | bucket of the position |
| example_id | int32 | the text, see `examples` |
| position | int32 | absolute token position, from 0 |
| vector | fixed_size_list<float32> | the head's {vectors} |
| sliding_window | int32 | the layer's window; null attends to all earlier tokens |
| token_str | string | the token at the position, where captured |"""

_STATISTICS_TABLE = """
| lse | float32 | ln Σ exp(s) over the scores s of all its keys, and of a learned sink |
| entropy | float32 | -Σ p ln p in nats, p = exp(s - lse) |
| max_prob | float32 | the largest p |
| argmax_position | int32 | the position of its key |
| sink_prob | float32 | p of the first token, and of a learned sink where the layer has one |
| local_prob | float32 | Σ p of the last {local_positions:,} positions, the query's own included |

The last six are in the files of queries alone. They are of the softmax over all keys, also those that
were not kept, and make the probability p of each key that was kept known."""

_PICTURES = {
    "positional-r2-queries": "How well the queries of each head tell position",
    "positional-r2-keys": "How well the keys of each head tell position",
    "norms-values": "Mean norm of the values of each head",
    "norms-outputs": "Mean norm of the outputs of each head",
    "softmax-entropy": "Entropy of each head's softmax",
    "softmax-sink_prob": "How much of its attention each head has on the first token",
    "softmax-local_prob": "How much it has on the last positions",
    "softmax-previous": "How often it attends most to the token before",
    "components-1q": "Principal components of the queries of one head, by position",
    "components-1k": "Principal components of its keys, by position",
    "moments-r2-queries": "How well the queries of each head tell position, of every token",
    "moments-spectra-queries": "Variance in the first principal components of each head's queries",
}
"""Files of a report that the card shows, and what is on them."""


def write_card(data_root: Path, manifest: Mapping[str, Any], place: Place | None = None) -> None:
    """Write the card of a data root anew; a person's own text and fields stay.

    Raises:
        UserError: The YAML of the card that is there is broken.
    """
    path = data_root / CARD_FILE
    existing = read_card(path) if path.exists() else None
    write_text(path, render_card(manifest, existing, place, report_files(data_root)))


def render_card(
    manifest: Mapping[str, Any],
    existing: str | None = None,
    place: Place | None = None,
    report: Collection[str] = (),
) -> str:
    """The card of a data root.

    Args:
        manifest: Its manifest.
        existing: The card that is there, whose own text and fields stay.
        place: Where on the Hub it is, for the line that loads it.
        report: Files of a report that are beside it, by their paths.

    Raises:
        UserError: The YAML of the existing card is broken.
    """
    fields = {
        "size_categories": [_size_category(count_rows(manifest))],
        "configs": configs_of(manifest),
    }
    return compose_card(existing, fields, _body(manifest, place, _pictures(report)))


def _size_category(rows: int) -> str:
    """The Hub's category for a number of rows."""
    thousands = rows // 1000
    return _SIZES[min(len(str(thousands)), len(_SIZES) - 1)] if thousands else _SIZES[0]


def shown_names(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What a reader is told of the names of model and dataset: of a path on a disk its end."""
    model, text = settings["model"].get("name"), settings["data"].get("path")
    texts = text if isinstance(text, list) else [text or "a dataset"]
    return _shown(model or "a causal language model"), described([*map(_shown, texts)])


def _shown(name: str) -> str:
    return _end(name) if _is_path(name) else name


def _end(path: str) -> str:
    """The last part of a path; of a pattern of files its directory too."""
    return "/".join(Path(path).parts[-2 if glob.has_magic(path) else -1 :])


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def describe_run(manifest: Mapping[str, Any]) -> str:
    """The model, the text and what was kept, as a list."""
    settings = manifest["settings"]
    model, data, capture = settings["model"], settings["data"], settings["capture"]
    sampler = capture["sampler"]
    non_finite = describe_non_finite(manifest)
    non_finite = non_finite and f"\n- {non_finite}"
    kept = _kept(sampler)
    beyond = "" if (found := describe_beyond(manifest)) is None else f"; {found}"
    about = {"revision": "revision", "dtype": "dtype", "attn_implementation": "attention"}
    known = {"data_files": "files", "split": "split", "messages_column": "conversations in"}
    some = _known(data, known)
    return f"""\
- model: {_name(model.get("name"))}{_known(model, about)}{_changed_weights(model)}
- text: {_name(data.get("path"))}{some}, {manifest["examples"]["rows"]:,} examples
- tokens: {_limit(data.get("tokenizer", {}).get("max_length"))} of each text{beyond}{_continued(model)}
- positions: {kept}, buckets from {capture["min_bucket_size"]:,}
- {len(captured_names(manifest)):,} heads, {count_rows(manifest):,} rows{non_finite}"""


def _continued(model: Mapping[str, Any]) -> str:
    """What the model has added to the texts; empty where that is nothing."""
    settings = model.get("generate")
    if not settings:
        return ""
    return (
        f"\n- the model has continued each text before it read all of it, with `{_listing(settings)}`"
    )


def _listing(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_as_yaml(value)}" for name, value in settings.items())


def _changed_weights(model: Mapping[str, Any]) -> str:
    """What was done to the weights of a checkpoint; empty where they are as it has them."""
    told = _known(model, {"adapter": "with the adapter", "adapter_revision": "of revision"})
    told += ", merged into the weights" * bool(model.get("merge_adapter"))
    settings = model.get("quantization")
    if settings:
        told += f", weights quantized with `{_listing(settings)}`"
    return told


def _as_yaml(value: Any) -> str:
    """A value as a config has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _kept(sampler: Mapping[str, Any]) -> str:
    """Which positions were kept."""
    if sampler["type"] == "all":
        return "every position"
    if sampler["type"] == "none":
        return "no rows are kept of any, for moments alone"
    kept = f"sampler `{sampler['type']}`"
    if sampler["type"] != "positions":
        kept += f", base rate {sampler['base_rate']}, seed {sampler['seed']}"
    if sampler.get("keep_first"):
        kept += f", and the first {sampler['keep_first']:,}"
    return kept + ", the same in all layers" * bool(sampler.get("shared"))


def _name(path: str | list[str] | None) -> str:
    """A model or dataset; what is passed as an object has no path."""
    return f"`{described(path)}`" if path else "in memory"


def _known(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The settings that have a value."""
    values = {name: settings.get(field) for field, name in names.items()}
    return "".join(f", {name} `{value}`" for name, value in values.items() if value is not None)


def describe_non_finite(manifest: Mapping[str, Any]) -> str:
    """Which rows, and how many of moments, hold an infinity or a NaN; empty where none does."""
    told = (_non_finite_rows(manifest), _non_finite_moments(manifest))
    return "; ".join(text for text in told if text)


def _non_finite_moments(manifest: Mapping[str, Any]) -> str:
    count = sum(facts.get("non_finite", 0) for facts in manifest.get("moments", {}).values())
    if count == 0:
        return ""
    return f"{count:,} row{'s' * (count > 1)} of moments hold{'s' * (count == 1)} inf or NaN"


def _non_finite_rows(manifest: Mapping[str, Any]) -> str:
    found = manifest.get("non_finite")
    if found is None:
        return ""
    layers, texts = found["layers"], found["texts"]
    place = f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}"
    rows = f"{found['rows']:,} row{'s' * (found['rows'] > 1)}"
    return f"{rows} of {texts:,} text{'s' * (texts > 1)} hold inf or NaN, in {place}"


def _limit(max_length: int | None) -> str:
    return "all" if max_length is None else f"the first {max_length:,}"


def _pictures(report: Collection[str]) -> str:
    """The main pictures of a report, empty where there is none."""
    paths = {f"{REPORT_DIRECTORY}/{name}.png": caption for name, caption in _PICTURES.items()}
    shown = [f"![{caption}]({path})" for path, caption in paths.items() if path in report]
    more = f"More pictures are on the page `{REPORT_DIRECTORY}/index.html`, which needs no network."
    return "\n\n".join(["\n## Pictures", *shown, more, ""]) if shown else ""


def _body(manifest: Mapping[str, Any], place: Place | None, pictures: str) -> str:
    name, text = shown_names(manifest["settings"])
    partial = "" if manifest["complete"] else "The run was interrupted: this is part of its texts.\n\n"
    kinds = kinds_of(manifest["settings"]["capture"])
    named = _listed(f"{KINDS[kind].name} (`{kind}`)" for kind in kinds)
    title = f"{'' if keeps_rows(manifest) else 'moments of '}{describe_kinds(manifest)}".capitalize()
    vectors = f"{'' if keeps_rows(manifest) else 'moments of the '}{named} vectors".capitalize()
    here = 'load_dataset("PATH_OR_REPO", {}, split="train")'
    shown = {"head" if keeps_rows(manifest) else "moments": first_directory(manifest)}
    arguments = {
        name: load_argument(manifest, directory)
        for name, directory in (shown | {"examples": EXAMPLES_DIRECTORY}).items()
    }
    lines = [
        f"{name} = {place.load_line(argument) if place else here.format(argument)}"
        for name, argument in arguments.items()
    ]
    return f"""\
# {title} of {name}

{vectors} of the attention heads of `{name}` while it read texts of `{text}`.

{partial}{describe_run(manifest)}

## Load

```python
from datasets import load_dataset

{chr(10).join(lines)}
```
{_about_configs(manifest)}
{_about_names(manifest, kinds)}`examples` maps `example_id` to the ids of the dataset.

## What was captured

{_captured(manifest)}
{pictures}{_about_files(manifest)}
## Licence

The vectors are made of the model's numbers and the dataset's text: the terms of both apply. The
`license` above is for whoever publishes them to set.
"""


def _about_files(manifest: Mapping[str, Any]) -> str:
    """What the files of heads and of moments hold."""
    if not keeps_rows(manifest):
        return f"\n{moments_section(manifest)}".removesuffix("\n")
    return f"""
## Columns

{_columns(manifest)}

Rows are sorted by `example_id` and `position`. `manifest.json` has settings, versions and checksums.

{moments_section(manifest)}## Rows

{_bucket_table(manifest["buckets"])}
"""


def describe_kinds(manifest: Mapping[str, Any]) -> str:
    """The kinds of vectors that are there, such as: queries and keys."""
    return _listed(KINDS[kind].plural for kind in kinds_of(manifest["settings"]["capture"]))


def _listed(names: Iterable[str], word: str = "and") -> str:
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


def _about_configs(manifest: Mapping[str, Any]) -> str:
    """What the configs are where there are too many heads for one each."""
    if has_config_of_each_head(manifest):
        return ""
    config = layer_config(next(iter(manifest["heads"])))
    return f"""
A head is loaded by its file, as above. The config `{config}` is all heads of its layer and kind, one
after another in the order of their numbers; each has the same number of rows.
"""


def _about_names(manifest: Mapping[str, Any], kinds: Collection[Kind]) -> str:
    """How heads are numbered, in names where these have files."""
    if not keeps_rows(manifest):
        return (
            f"With grouped-query attention key heads are counted by themselves.{_about_numbers(kinds)} "
        )
    return f"""\
`l00h05q` is query head 5 of layer 0, `l00h01k` its key head 1; with grouped-query attention key heads
are counted by themselves.{_about_numbers(kinds)} """


def _about_numbers(kinds: Collection[Kind]) -> str:
    """How the heads of values and outputs are numbered, where there are some."""
    numbered = {"v": "Values (`v`) are numbered as keys", "o": "outputs (`o`) as queries"}
    told = [text for kind, text in numbered.items() if kind in kinds]
    return f" {_listed(told).capitalize()}." if told else ""


def _columns(manifest: Mapping[str, Any]) -> str:
    """The table of columns, with those of the statistics where they are there."""
    capture = manifest["settings"]["capture"]
    names = _listed((KINDS[kind].name for kind in kinds_of(capture)), "or")
    table = _SCHEMA_TABLE.format(vectors=names)
    if has_softmax(manifest):
        n_local = capture.get("local_positions", LOCAL_POSITIONS)
        table += _STATISTICS_TABLE.format(local_positions=n_local)
    return table


def _captured(manifest: Mapping[str, Any]) -> str:
    capture = manifest["settings"]["capture"]
    heads, kinds = captured_names(manifest), kinds_of(capture)
    counts = {kind: sum(name.endswith(kind) for name in heads) for kind in kinds}
    counted = _listed(f"{count:,} {KINDS[kind].name} heads" for kind, count in counts.items())
    layers = {int(name[1:].partition("h")[0]) for name in heads}
    lines = [f"{counted}, in {len(layers)} layers"]
    if sampling := capture["head_sampling"]:
        lines.append(f"query heads drawn at random, {sampling['count']:,} with seed {sampling['seed']}")
    lines += [text for text in (_about_rope(capture, kinds), _about_outputs(kinds)) if text]
    if has_softmax(manifest):
        lines.append("statistics of the softmax of each query, over all keys that it attends to")
    windows = {layer["layer_idx"]: layer["sliding_window"] for layer in manifest["layers"]}
    sliding = [layer for layer in sorted(layers) if windows[layer] is not None]
    if sliding:
        sizes = sorted({windows[layer] for layer in sliding})
        lines.append(
            f"layers {_ranges(sliding)} attend within a window of {' or '.join(map(str, sizes))} "
            "tokens; the others to all earlier tokens"
        )
    elif capture["full_attention_only"]:
        lines.append("layers with a sliding window were left out")
    return "\n".join(f"- {line}" for line in [*lines, *manifest["notes"]])


def _about_rope(capture: Mapping[str, Any], kinds: Collection[Kind]) -> str:
    """At which point queries and keys were captured; empty where there are none."""
    turned = [KINDS[kind].plural for kind in kinds if kind in "qk"]
    vectors = "vectors" if len(turned) == len(kinds) else _listed(turned) if turned else ""
    if not vectors:
        return ""
    if capture["capture_pre_rope"]:
        return f"{vectors} as they are before the rotary embedding"
    return f"{vectors} that the attention multiplied: after the rotary embedding, where there is one"


def _about_outputs(kinds: Collection[Kind]) -> str:
    """What an output is, where there are some."""
    told = (
        "outputs of each query head before the output projection: the sum of its values by probability"
    )
    return told if "o" in kinds else ""


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as a person writes them: 0-4, 6, 8-9."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def _bucket_table(buckets: Mapping[str, int]) -> str:
    """Rows of all heads by bucket, neighbours together where there are many."""
    numbers = [*buckets]
    step = -(-len(numbers) // _MOST_BUCKETS) or 1
    lines = ["| bucket | rows of all heads |", "|---|---|"]
    for first in range(0, len(numbers), step):
        some = numbers[first : first + step]
        label = some[0] if len(some) == 1 else f"{some[0]} to {some[-1]}"
        lines.append(f"| {label} | {sum(buckets[number] for number in some):,} |")
    return "\n".join(lines)
