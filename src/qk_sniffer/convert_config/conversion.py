"""Turns a config of the original scripts into one of ours, and says what is not the same in it."""

from pathlib import Path

import yaml

from qk_sniffer.convert_config.original import DTYPES, FIELDS, SECTIONS, Section, read_original

_NO_EQUAL = {
    "tokenizer": {
        "padding": "a batch is padded to its longest text, and padding is never captured",
        "padding_side": "padding is on the right, so that positions count from the start of a text",
    },
    "inference": {
        "distributed": "each process takes a device; start them with torchrun or set trainer.devices",
        "backend": "Lightning chooses it",
        "debug_logging": "a run shows its progress and ends with a table",
        "debug_log_every_n_batches": "a run shows its progress and ends with a table",
        "mps_cleanup_every_batches": "nothing is done instead",
    },
    "capture": {
        "max_rows_per_batch": "the sampler alone decides; a lower base_rate keeps fewer rows",
        "queue_size": "rows go to a journal on disk as they come",
    },
    "output": {
        "readme_path": "the card is README.md in data_root",
        "write_batch_size": "the size of row groups is not set",
    },
}
"""What happens instead of a field that ours has not, said where the original does not leave it."""


def convert_config(file: Path) -> tuple[str, list[str]]:
    """Convert a config of the original scripts.

    Args:
        file: YAML with the sections dataset, model, tokenizer, inference, capture and output.

    Returns:
        The YAML of a config for ``qk-sniffer predict``, and a line for each field that has no equal or
        means something else.

    Raises:
        UserError: The file can't be read, is no such config, or a field is unknown or wrong.
    """
    original = read_original(file)
    converted = yaml.safe_dump(_converted(original), sort_keys=False, allow_unicode=True)
    return f"# Converted from {file.name}.\n{converted}", _differences(original)


def _converted(original: dict[str, Section]) -> Section:
    """The sections of ours, with every field whose default is another in the original."""
    dataset, model, tokenizer, inference, capture, output = (original[name] for name in SECTIONS)
    device_map = model["device_map"] if isinstance(model["device_map"], str) else None
    return {
        "model": {
            "name": model["name"],
            "revision": model["revision"] or "main",
            "dtype": DTYPES[model["dtype"].lower()],
            "attn_implementation": model["attn_implementation"],
            "trust_remote_code": model["trust_remote_code"],
            "device_map": None if inference["distributed"] else device_map,
            "config_overrides": model["config_overrides"],
        },
        "data": {
            "path": dataset["path"],
            "name": dataset["name"],
            "split": dataset["split"],
            "text_column": dataset["text_column"],
            "id_column": dataset["id_column"] or None,
            "max_samples": dataset["max_samples"],
            "streaming": dataset["streaming"],
            # Named always: the original took the tokenizer of main, whatever the model's revision.
            "tokenizer": {
                "name": tokenizer["name"] or model["name"],
                "max_length": tokenizer["max_length"],
                "trust_remote_code": tokenizer["trust_remote_code"],
            },
            "batch_size": inference["batch_size"],
        },
        "sniffer": {
            "capture": {
                "capture_queries": capture["capture_queries"],
                "capture_keys": capture["capture_keys"],
                "layers": capture["layers"] or None,
                "heads": capture["heads"] or None,
                "head_sampling": capture["head_sampling"],
                "full_attention_only": capture["full_attention_only"],
                "capture_pre_rope": capture["capture_pre_rope"],
                "capture_token_strings": capture["capture_token_strings"],
                "min_bucket_size": capture["min_bucket_size"],
                "sampler": {
                    "type": capture["sampler"]["type"].lower(),
                    "base_rate": float(capture["sampler"]["base_rate"]),
                    "seed": 0,
                },
            },
            "output": {
                "data_root": output["data_root"],
                "hf_repo_id": output["hf_repo_id"] or None,
                "hf_branch": None if output["hf_branch"] == "main" else output["hf_branch"] or None,
                "private": output["private"],
            },
        },
        "trainer": {"accelerator": "auto", "devices": "auto" if inference["distributed"] else 1},
    }


def _differences(original: dict[str, Section]) -> list[str]:
    """A line for each field that has no equal, or that means something else to ours."""
    dataset, model, _, inference, capture, output = (original[name] for name in SECTIONS)
    dtype, autocast_dtype = (
        DTYPES[name.lower()] for name in (model["dtype"], inference["autocast_dtype"])
    )
    has_device_map = not (inference["distributed"] or isinstance(model["device_map"], str | None))
    has_own_key_heads = capture["heads"] and capture["head_sampling"] is None
    branch, publishes = output["hf_branch"], bool(output["hf_repo_id"])
    lines = [
        f"{section}.{name}: has no equal; {instead}"
        for section, names in _NO_EQUAL.items()
        for name, instead in names.items()
        if original[section][name] != FIELDS[section][name].default
    ]
    for line, applies in (
        (
            "dataset.id_column: an id that is no 32-bit integer becomes a digest of 4 bytes, where the "
            "original's has 8",
            dataset["id_column"],
        ),
        (
            "model.attn_implementation: not set; the original took flash_attention_2 where flash_attn "
            "was installed, and here transformers chooses",
            not model["attn_implementation"],
        ),
        (
            "model.device_map: has no equal but auto, which spreads the model; it goes to one device",
            has_device_map,
        ),
        (
            "inference.autocast_dtype: has no equal; the original multiplied matrices in "
            f"{autocast_dtype} on a GPU, and here all is computed in model.dtype, {dtype}",
            autocast_dtype != dtype,
        ),
        (
            "capture.heads: key heads follow the query heads; the original took those of like number",
            has_own_key_heads,
        ),
        (
            "capture.head_sampling: as many heads are drawn, but others than by the original",
            capture["head_sampling"],
        ),
        (
            "capture.sampler: as many rows are kept on average, but others than by the original",
            capture["sampler"]["type"].lower() != "all",
        ),
        (
            "output.data_root: the original emptied it before a run; here a run goes on with what is "
            "there, so give each model one of its own",
            True,
        ),
        (
            "output.hf_repo_id: the original replaced what a branch held; here a run adds to it",
            publishes,
        ),
        (
            "output.hf_branch: the original wrote to main; here a run has a branch, named after model "
            "and dataset",
            publishes and branch in (None, "", "main"),
        ),
    ):
        if applies:
            lines.append(line)
    return lines
