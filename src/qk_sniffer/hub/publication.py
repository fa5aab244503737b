"""Where a data root is published, kept in it so that a push can be repeated."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qk_sniffer.config import described, require_hub_names
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.storage import (
    PUBLICATION_FILE,
    Place,
    explained_writing,
    parse_json,
    publication_fault,
    write_text,
)

_FILE_TYPE = re.compile(r"\.(jsonl?|parquet|csv|txt)$")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._]+")


@dataclass
class Publication:
    """A branch of a Hub dataset that holds one data root.

    Attributes:
        repo_id: The dataset, OWNER/NAME.
        branch: Its branch.
        private: Whether the dataset is to be private.
        replaces: The commit of the branch that is replaced and not merged; None where there is none.
        card: What a person had added to the card that was last pushed, as ``own_part`` gives it.
    """

    repo_id: str
    branch: str
    private: bool = False
    replaces: str | None = None
    card: str = ""

    @classmethod
    def of_run(
        cls,
        data_root: Path,
        settings: Mapping[str, Any],
        repo_id: str,
        branch: str | None,
        private: bool,
    ) -> "Publication":
        """That of a run, with what its data root knows of the branch already.

        Args:
            data_root: The run's data root.
            settings: Its sections model and data, from which a branch is derived.
            repo_id: The dataset.
            branch: Its branch; None derives one.
            private: Whether the dataset is to be private.

        Raises:
            UserError: No branch is named and the model has no name, or the data root's file is damaged.
        """
        publication = cls(repo_id, branch or default_branch(settings), private)
        earlier = cls.read(data_root)
        if earlier is not None and earlier.place == publication.place:
            publication.replaces, publication.card = earlier.replaces, earlier.card
        return publication

    @property
    def place(self) -> Place:
        """Where it is loaded from."""
        return Place(self.repo_id, self.branch)

    def write(self, data_root: Path) -> None:
        """Keep it in a data root."""
        path = data_root / PUBLICATION_FILE
        with explained_writing(path, "make room or mend the disk, then try again"):
            write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, data_root: Path) -> "Publication | None":
        """That of a data root; None where it was never to be published.

        Raises:
            UserError: The file is damaged.
        """
        path = data_root / PUBLICATION_FILE
        if not path.exists():
            return None
        try:
            content = parse_json(path.read_bytes())
            fault = publication_fault(content)
            if fault is None:
                require_hub_names(content["repo_id"], content["branch"])
        except (ValueError, OSError, UserError) as error:
            fault = first_line(error)
        if fault is not None:
            raise UserError(
                f"{path}: damaged, it does not name a repository ({fault}); remove it, then give "
                "`qk-sniffer push` --hf_repo_id and --hf_branch"
            )
        return cls(
            **{field.name: content[field.name] for field in fields(cls) if field.name in content}
        )


def default_branch(settings: Mapping[str, Any]) -> str:
    """The branch of a run that names none, such as Qwen3-8B-longbench-pro-128k-plus.

    Args:
        settings: Its sections model and data.

    Raises:
        UserError: The model has no name, or one that no branch can have.
    """
    model, text = settings["model"].get("name"), settings["data"].get("path")
    if model is None:
        raise UserError(
            "sniffer.output.hf_branch: null derives it from the model's name, and this module has "
            "none; name a branch"
        )
    branch = _short_name(model)
    if text is not None:
        texts = text if isinstance(text, list) else [text]
        branch += "-" + described([*map(_short_name, texts)]).replace(" ", "-")
    require_hub_names(None, branch)
    return branch


def _short_name(name: str) -> str:
    """The end of a name; of a pattern of files that has no letters, such as *.jsonl, its directory."""
    ends = (_FILE_TYPE.sub("", part) for part in reversed(Path(name).parts))
    plain = (_NOT_IN_A_NAME.sub("-", end).strip("-.") for end in ends)
    return next((end for end in plain if end), "")
