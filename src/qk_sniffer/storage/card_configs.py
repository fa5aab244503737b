"""The configs of a card, by which datasets finds heads, and the expressions that load one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qk_sniffer.kinds import KINDS, Kind
from qk_sniffer.storage.file_facts import head_files, joined_checksum, moment_file
from qk_sniffer.storage.schema import (
    EXAMPLES_DIRECTORY,
    MOMENTS_DIRECTORY,
    head_name,
    parse_head_name,
)

MOST_CONFIGS = 3000
"""The Hub's viewer shows no dataset that has more."""


@dataclass(frozen=True)
class Place:
    """A branch of a Hub dataset."""

    repo_id: str
    branch: str

    def load_line(self, argument: str) -> str:
        """The Python expression that loads a head or the examples from it.

        Args:
            argument: What ``load_argument`` gives.
        """
        return f'load_dataset("{self.repo_id}", {argument}, revision="{self.branch}", split="train")'


def has_config_of_each_head(manifest: Mapping[str, Any]) -> bool:
    """Whether a head is a config; otherwise the heads of a layer and kind are one together."""
    return len(manifest["heads"]) + len(_moments(manifest)) < MOST_CONFIGS


def load_argument(manifest: Mapping[str, Any], name: str) -> str:
    """The argument of ``load_dataset`` that names a head, the examples or moments."""
    if name == EXAMPLES_DIRECTORY or name in _moments(manifest) or has_config_of_each_head(manifest):
        return f'"{name}"'
    return f'data_files="{name}/*.parquet"'


def first_directory(manifest: Mapping[str, Any]) -> str:
    """What a line that loads something shows: the first head, or moments where none has files."""
    first: str = [*manifest["heads"], *_moments(manifest), EXAMPLES_DIRECTORY][0]
    return first


def configs_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configs of a data root's card."""
    examples = {EXAMPLES_DIRECTORY: [EXAMPLES_DIRECTORY]}
    if has_config_of_each_head(manifest):
        names = {name: [name] for name in manifest["heads"]} | examples
    else:
        # datasets looks for the files of the first config, whichever it loads.
        names = examples | _heads_of_layers(manifest)
    configs = [_config(manifest, name, heads) for name, heads in names.items()]
    moments = _moments(manifest)
    return configs + [
        _described(name, [moment_file(kind)], [manifest["moments"][kind]["xxh3_128"]])
        for name, kind in moments.items()
    ]


def moments_config(kind: Kind) -> str:
    """The config of the moments of a kind."""
    return f"{MOMENTS_DIRECTORY}_{kind}"


def _moments(manifest: Mapping[str, Any]) -> dict[str, Kind]:
    """The configs of moments, and their kinds; none where there are no moments."""
    return {moments_config(kind): kind for kind in KINDS if kind in manifest.get("moments", ())}


def layer_config(name: str) -> str:
    """The config of a head's layer and kind, such as l00q."""
    parsed = parse_head_name(name)
    assert parsed is not None
    layer_idx, _, kind = parsed
    return head_name(layer_idx, 0, kind).partition("h")[0] + kind


def _heads_of_layers(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in manifest["heads"]:
        found.setdefault(layer_config(name), []).append(name)
    return found


def _config(manifest: Mapping[str, Any], name: str, directories: list[str]) -> dict[str, Any]:
    """One config, with the files of some heads or the examples."""
    facts = manifest["heads"] | {EXAMPLES_DIRECTORY: manifest["examples"]}
    paths = [path for directory in directories for path in head_files(directory, facts[directory])]
    return _described(name, paths, [facts[directory]["xxh3_128"] for directory in directories])


def _described(name: str, paths: list[str], digests: list[str]) -> dict[str, Any]:
    digest = digests[0] if len(digests) == 1 else joined_checksum(digests)
    return {
        "config_name": name,
        "data_files": [{"split": "train", "path": paths[0] if len(paths) == 1 else paths}],
        # load_dataset caches a local directory under its base name and these configs alone:
        # without the digest it would serve the rows of an older or a namesake data root.
        "description": f"XXH3 {digest}",
    }
