"""What a person sees while files are written and when a run has ended."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qk_sniffer.storage import (
    Place,
    captured_names,
    count_rows,
    describe_beyond,
    describe_moments,
    describe_non_finite,
    first_directory,
    keeps_rows,
    load_argument,
)


def nothing_kept(manifest: dict[str, Any]) -> str:
    """What to do about a run without rows; empty where it has some, or was to have none."""
    if count_rows(manifest) > 0:
        return ""
    if manifest["examples"]["rows"] == 0:
        return "no rows were kept, since no text was read to its end; run the same command again"
    if not keeps_rows(manifest):
        return ""
    return (
        "no rows were kept; set sniffer.capture.sampler.type: all for short texts, or raise "
        "sniffer.capture.sampler.base_rate or lower sniffer.capture.min_bucket_size"
    )


def file_progress(
    files: Iterable[Any], total: int, label: str = "Writing", unit: str = "file"
) -> Iterable[Any]:
    """A bar over the files of a data root while they are written or measured."""
    return tqdm(files, total=total, desc=label, unit=unit)  # type: ignore[no-any-return]


def summary_table(data_root: Path, manifest: dict[str, Any], *, seconds: float) -> str:
    """Heads, rows, bytes, seconds, place and load line of a finished data root.

    Args:
        data_root: Where it is.
        manifest: Its manifest.
        seconds: Wall time from the first batch to the last file.
    """
    files = (*manifest["heads"].values(), *manifest.get("moments", {}).values())
    first = load_argument(manifest, first_directory(manifest))
    lines = {
        "heads": f"{len(captured_names(manifest)):,}",
        "rows": f"{count_rows(manifest):,}",
        "bytes": f"{sum(file['bytes'] for file in files):,}",
        "seconds": f"{seconds:.1f}",
        "where": str(data_root),
        "load": f'datasets.load_dataset("{data_root}", {first}, split="train")',
    }
    if (moments := describe_moments(manifest)) is not None:
        lines["moments"] = moments
    table = "\n".join(f"{name:<8} {value}" for name, value in lines.items())
    if nothing := nothing_kept(manifest):
        table += f"\n{nothing}"
    if (beyond := describe_beyond(manifest)) is not None:
        table += f"\n{beyond}"
    if non_finite := warn_of_non_finite(manifest):
        table += f"\n{non_finite}"
    return table


def warn_of_non_finite(manifest: dict[str, Any]) -> str:
    """Which rows hold an infinity or a NaN, and what to do; empty where none does."""
    found = describe_non_finite(manifest)
    dtype = manifest["settings"]["model"].get("dtype")
    if not found:
        return ""
    if dtype == "float32":
        return f"{found}; look at the model's weights, since model.dtype is float32 already"
    wider = "float32" if dtype == "bfloat16" else "bfloat16, or to float32,"
    return f"{found}; set model.dtype to {wider} and capture them anew"


def published_table(place: Place, manifest: dict[str, Any]) -> str:
    """Place and load line of a data root on the Hub."""
    first = load_argument(manifest, first_directory(manifest))
    return f"on the Hub  {place.repo_id}, branch {place.branch}\nload        {place.load_line(first)}"
