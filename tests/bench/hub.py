"""Publishing, pulling and loading heads, on a Hub on this machine."""

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import datasets
import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import PreTrainedConfig

from bench.loops import timed
from bench.tables import section
from bench.texts import ALL, long_files
from families import MANY_HEADS, MOST_HEADS, tiny_model
from loopback import client_of
from qk_sniffer import cli
from qk_sniffer.hub import Publication, pull, push
from qk_sniffer.storage import PUBLICATION_FILE, file_progress, merge_pulled, require_manifest

HUB_TEXTS, HUB_TOKENS = 4, 128
HUB_USER, HUB_TOKEN = "someone", "hf_ofTheBenchmark"
HUB_BRANCH, HUB_HEAD = "tiny", "l00h00q"
HUB_MOST = 1000
"""Files of one commit."""


@contextlib.contextmanager
def hub_process() -> Iterator[str]:
    """A Hub on this machine in a process of its own; gives its endpoint."""
    command = [sys.executable, "-m", "loopback", "--user", HUB_USER, "--token", HUB_TOKEN]
    tests = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            endpoint = server.stdout.readline().strip()
            assert endpoint, "the Hub did not start"
            yield endpoint
        finally:
            server.kill()


def capture_heads(place: Path, config: PreTrainedConfig) -> Path:
    """The data root of a run with all heads of a tiny model."""
    place.mkdir(exist_ok=True)
    # Its import sets HF_HUB_OFFLINE, which client_of takes back.
    from conftest import byte_tokenizer

    tiny_model(config).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    file, root = place / "config.yaml", place / "root"
    with long_files(HUB_TEXTS) as texts:
        sections = {
            "model": {"name": str(place / "model")},
            "data": {"path": texts, "tokenizer": {"max_length": HUB_TOKENS}},
            "sniffer": {"capture": asdict(ALL), "output": {"data_root": str(root)}},
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        file.write_text(yaml.safe_dump(sections), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(["predict", "--config", str(file)])
    assert status == 0, "the capture failed"
    return root


def pushed_files(data_root: Path) -> dict[str, Path]:
    """All files of a data root but the one that says where it is published."""
    found = [p for p in sorted(data_root.rglob("*")) if p.is_file() and p.name != PUBLICATION_FILE]
    return {path.relative_to(data_root).as_posix(): path for path in found}


def commit_bare(api: HfApi, repo_id: str, files: dict[str, Path]) -> None:
    """Put files on a new branch of a new repository as the Hub's client does it by itself."""
    api.create_repo(repo_id, repo_type="dataset")
    api.create_branch(repo_id, branch=HUB_BRANCH, repo_type="dataset")
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    for first in range(0, len(operations), HUB_MOST):
        some = operations[first : first + HUB_MOST]
        api.create_commit(
            repo_id, some, commit_message="bare", repo_type="dataset", revision=HUB_BRANCH
        )


def count_commits(api: HfApi, repo_id: str) -> int:
    """Commits on the branch and on main, besides the one with which the repository begins."""
    histories = [
        api.list_repo_commits(repo_id, repo_type="dataset", revision=branch)
        for branch in (HUB_BRANCH, "main")
    ]
    return len({commit.commit_id for history in histories for commit in history}) - 1


class Published(NamedTuple):
    """Seconds of publishing barely, with ``push`` and once more, and the commits of the last two."""

    bare: float
    push: float
    again: float
    commits: int
    commits_again: int


def publish(endpoint: str, data_root: Path, cache: Path, bare_id: str, own_id: str) -> Published:
    files, publication = pushed_files(data_root), Publication(own_id, HUB_BRANCH)
    with client_of(endpoint, HUB_TOKEN, cache) as api:
        bare = timed(lambda: commit_bare(api, bare_id, files))
        first = timed(lambda: push(data_root, publication))
        commits = count_commits(api, own_id)
        again = timed(lambda: push(data_root, publication))
        return Published(bare, first, again, commits, count_commits(api, own_id) - commits)


def pull_whole(endpoint: str, repo_id: str, source: Path, place: Path) -> float:
    """Seconds of bringing a branch into a new data root, which must become what was pushed."""
    manifest, root = require_manifest(source), place / "root"

    def bring() -> None:
        pull(root, Publication(repo_id, HUB_BRANCH), manifest["fingerprint"], overwrite=False)
        merge_pulled(root, file_progress)

    with client_of(endpoint, HUB_TOKEN, place / "cache"):
        seconds = timed(bring)
    assert require_manifest(root)["heads"] == manifest["heads"], "not what was pushed"
    return seconds


def load_head(endpoint: str, source: str, cache: Path, **named: str) -> float:
    """Seconds of loading one head with an empty cache, by its name unless it is named otherwise."""
    named = {"name": HUB_HEAD} | named
    if "data_files" in named:
        del named["name"]
    with client_of(endpoint, HUB_TOKEN, cache):
        return timed(lambda: datasets.load_dataset(source, split="train", **named))


def fetched_bytes(cache: Path) -> tuple[list[int], list[int]]:
    """Bytes of each file that came from the Hub into a cache: Parquet files, and others."""
    files = {path.resolve() for path in cache.rglob("*") if path.is_file()}
    parquet = {path for path in files if path.read_bytes()[:4] == b"PAR1"}
    snapshots = {p.resolve() for p in cache.glob("hub/*/snapshots/**/*") if p.is_file()}
    sizes = [[path.stat().st_size for path in some] for some in (parquet, snapshots - parquet)]
    return sizes[0], sizes[1]


class Transfer(NamedTuple):
    """One repetition: seconds, and the bytes of the Parquet and other files that one head fetched."""

    published: Published
    pull: float
    local: float
    load: float
    fetched: tuple[list[int], list[int]]


def transfer(endpoint: str, data_root: Path, place: Path, number: int) -> Transfer:
    """Publish a data root and bring it back, each step but the second push with an empty cache."""
    bare_id, own_id = (f"{HUB_USER}/{kind}-{number}" for kind in ("bare", "own"))
    return Transfer(
        publish(endpoint, data_root, place / "pushing", bare_id, own_id),
        pull_whole(endpoint, own_id, data_root, place),
        load_head(endpoint, str(data_root), place / "local"),
        load_head(endpoint, own_id, place / "loading", revision=HUB_BRANCH),
        fetched_bytes(place / "loading"),
    )


def time_hub(repetitions: int) -> str:
    """Publish one data root and bring it back, in turn, after a round that only warms up."""
    with tempfile.TemporaryDirectory() as directory, hub_process() as endpoint:
        place = Path(directory)
        with client_of(endpoint, None, place / "capturing"):
            root = capture_heads(place, MANY_HEADS)
            largest = capture_heads(place / "largest", MOST_HEADS)
        runs = []
        for number in range(repetitions + 1):
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                runs.append(transfer(endpoint, root, Path(scratch), number))
        sizes = [path.stat().st_size for path in pushed_files(root).values()]
        last = most_heads_section(endpoint, largest, place / "most")
    return f"{hub_section(runs[1:], len(sizes))}\n\n{traffic_section(runs[1:], sizes)}\n\n{last}"


def most_heads_section(endpoint: str, data_root: Path, place: Path) -> str:
    """Publish a data root of more files than a commit may have, and bring parts of it back, once."""
    place.mkdir()
    repo_id, files = f"{HUB_USER}/most", pushed_files(data_root)
    publication = Publication(repo_id, HUB_BRANCH)
    with client_of(endpoint, HUB_TOKEN, place / "pushing") as api:
        first = timed(lambda: push(data_root, publication))
        commits = count_commits(api, repo_id)
        again = timed(lambda: push(data_root, publication))
    rows = [
        ("", "s", "files fetched", "kB"),
        ("push", f"{first:.2f}", "", ""),
        ("push again, nothing has changed", f"{again:.2f}", "", ""),
    ]
    for label, named in (
        (f"load_dataset of {HUB_HEAD} by data_files", {"data_files": f"{HUB_HEAD}/*.parquet"}),
        ("load_dataset of all queries of a layer", {"name": "l79q"}),
        ("load_dataset of the texts", {"name": "examples"}),
    ):
        cache = place / str(len(rows))
        seconds = load_head(endpoint, repo_id, cache, revision=HUB_BRANCH, **named)
        parquet, _ = fetched_bytes(cache)
        rows.append((label, f"{seconds:.2f}", f"{len(parquet)}", f"{sum(parquet) / 1e3:,.1f}"))
    pulled = pull_whole(endpoint, repo_id, data_root, place)
    rows.append(("pull into an empty data root, and merge", f"{pulled:.2f}", f"{len(files):,}", ""))
    card = files["README.md"].stat().st_size
    return section(
        "The Hub with 6,000 heads",
        f"A data root of {len(files):,} files of a tiny model that has more heads than one of 70B, of "
        f"the same texts, once. Its card has {card / 1e3:,.0f} kB. The Hub refuses commits of more "
        f"than 1,000 files, and push made {commits} with the list on main; load_dataset begins with "
        "empty caches.",
        *rows,
    )


def hub_section(runs: list[Transfer], n_files: int) -> str:
    bare, own, again = (
        [getattr(run.published, name) for run in runs] for name in ("bare", "push", "again")
    )
    local, load = ([getattr(run, name) for run in runs] for name in ("local", "load"))
    rows = [("", "s", "ratio", "range", "goal")]
    for name, values, base, label, goal in (
        ("bare: create_repo, create_branch, create_commit", bare, None, "", ""),
        ("push", own, bare, "bare", "at most 1.3"),
        ("push again, nothing has changed", again, bare, "bare", ""),
        ("pull into an empty data root, and merge", [run.pull for run in runs], None, "", ""),
        (f"load_dataset of {HUB_HEAD} from the data root", local, None, "", ""),
        (f"load_dataset of {HUB_HEAD} from the Hub", load, local, "data root", ""),
    ):
        cells = ("", "")
        if base is not None:
            ratios = [value / of for value, of in zip(values, base, strict=True)]
            cells = f"/ {label} {median(ratios):.2f}", f"{min(ratios):.2f} - {max(ratios):.2f}"
        rows.append((name, f"{median(values):.2f}", *cells, goal))
    return section(
        "Hub",
        f"A data root of {n_files:,} files, most of them one head each, of a tiny model that has as "
        f"many heads as one of 8B: `all` of {HUB_TEXTS} x {HUB_TOKENS} tokens; medians of {len(runs)}, "
        "after a round that is not counted. The Hub is a server on this same machine, in a process of "
        "its own that keeps the files in memory, and is reached by the loopback: neither a network nor "
        "the limits of the real Hub are in these figures. Bare and push each fill a new branch of a "
        "new repository with the same files, in as few commits as the Hub takes; push lists the branch "
        "on main as well. The second push finds what the first has cached; all other steps begin with "
        "an empty cache.",
        *rows,
    )


def traffic_section(runs: list[Transfer], sizes: list[int]) -> str:
    """Commits and files, the most of any repetition."""
    parquet, others = (max((run.fetched[kind] for run in runs), key=len) for kind in (0, 1))

    def files(name: str, found: list[int], goal: str = "") -> tuple[str, ...]:
        return name, f"{len(found):,}", f"{sum(found) / 1e3:,.1f}", goal

    def commits(name: str, found: Iterable[int], goal: str = "") -> tuple[str, ...]:
        return name, f"{max(found)}", "", goal

    return section(
        "Commits and files of the Hub",
        "Commits are those on the branch and on main together, besides the one with which the "
        "repository begins. What load_dataset fetched is what lies in a cache that was empty.",
        ("", "number", "kB", "goal"),
        commits("commits of push", [run.published.commits for run in runs], "at most 3"),
        commits("commits of push again", [run.published.commits_again for run in runs]),
        files("files of the data root", sizes),
        files(f"Parquet files fetched for {HUB_HEAD}", parquet, "1"),
        files("other files fetched with it", others),
    )
