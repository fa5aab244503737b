"""The dataclasses that the YAML sections fill, with the checks that need no model and no data.

The string under each field is its help text on the command line.
"""

import math
import operator
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qk_sniffer.config.local_or_hub import is_address
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import LOCAL_POSITIONS

_LATER_FIELDS = ("capture_values", "capture_outputs", "capture_softmax", "local_positions")
_LATER_SAMPLER_FIELDS = ("keep_first", "positions", "shared")
"""Fields that came later: settings have them only where used, so that earlier data roots go on."""

_BRANCH = re.compile(r"(?!refs/)(?!.*(\.\.|\.lock$))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)*", re.ASCII)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class HeadSamplingConfig:
    """A random draw of heads over the whole model."""

    count: int
    """How many query heads to draw over all layers (all of them where the model has fewer)."""
    seed: int = 0
    """Seed of the draw."""


@dataclass
class SamplerConfig:
    """Which positions of each sequence are kept."""

    type: str = "uniform"
    """log_uniform, uniform, all, positions, none, or the class path of a subclass of
    qk_sniffer.capture.Sampler."""
    base_rate: float = 1.0
    """Expected rows kept in each bucket of a sequence, for every head; all, positions and none ignore
    it."""
    seed: int = 0
    """Seed of the random stream, from 0 to 2^64 - 1."""
    keep_first: int = 0
    """Number of first positions of each sequence that are kept besides what the sampler keeps."""
    positions: list[int] | None = None
    """What type positions keeps of each sequence, counted from 0; null takes data.positions_column."""
    shared: bool = False
    """Draw once for queries and keys of all layers, which then keep the same positions."""

    def __post_init__(self) -> None:
        _require(
            self.keep_first >= 0,
            f"sniffer.capture.sampler.keep_first: must be at least 0, got {self.keep_first}",
        )
        _require(
            self.keep_first == 0 or self.keeps_rows,
            "sniffer.capture.sampler.keep_first: the sampler none keeps no rows; leave it out, or "
            "choose another sampler",
        )
        if self.positions is not None:
            self.positions = _ascending(self.positions)
            _require(
                self.type == "positions",
                f"sniffer.capture.sampler.positions: the sampler {self.type} does not use them; set "
                "sniffer.capture.sampler.type to positions, or leave them out",
            )
        _require(
            1e-30 <= self.base_rate < math.inf,
            "sniffer.capture.sampler.base_rate: must be a finite number of at least 1e-30, got "
            f"{self.base_rate}",
        )
        _require(
            0 <= self.seed < 2**64,
            f"sniffer.capture.sampler.seed: must lie between 0 and 2^64 - 1, got {self.seed}",
        )

    @property
    def keeps_rows(self) -> bool:
        """Whether rows are captured, and not moments alone."""
        return self.type != "none"


def _ascending(positions: Collection[int]) -> list[int]:
    """Positions in ascending order, each once."""
    try:
        found = sorted({operator.index(position) for position in positions})
    except TypeError:
        found = []
    _require(
        bool(found) and found[0] >= 0 and found[-1] < 2**31,
        "sniffer.capture.sampler.positions: expected at least one integer, each between 0 and "
        f"2^31 - 1, got {positions}",
    )
    return found


@dataclass
class CaptureConfig:
    """What is captured: queries or keys, which layers and heads, which positions."""

    capture_queries: bool = True
    """Capture the query vectors."""
    capture_keys: bool = True
    """Capture the key vectors."""
    capture_values: bool = False
    """Capture the value vectors, of the positions that the keys keep."""
    capture_outputs: bool = False
    """Capture each query head's output before the output projection, where the queries are kept."""
    capture_softmax: bool = False
    """Add statistics of each kept query's softmax over all its keys to the files of the queries."""
    local_positions: int = LOCAL_POSITIONS
    """Positions that the statistic local_prob counts, up to the query's own and with it."""
    layers: list[int] | None = None
    """Layers to capture, counted from 0; null captures all."""
    heads: list[int] | None = None
    """Query heads to capture in each layer; key heads follow by GQA; null captures all."""
    head_sampling: HeadSamplingConfig | None = None
    """Draw query heads at random over all layers, key heads following; null captures all."""
    full_attention_only: bool = False
    """Leave out layers with a sliding window."""
    capture_pre_rope: bool = False
    """Store the vectors as they are before the rotary embedding."""
    capture_token_strings: bool = False
    """Store the token at each position in the column token_str."""
    min_bucket_size: int = 8192
    """Positions in a bucket of uniform; smallest bucket of log_uniform, rounded up to 2^i."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Which positions are kept."""

    def __post_init__(self) -> None:
        _require(
            self.capture_queries or self.capture_keys or self.capture_values or self.capture_outputs,
            "sniffer.capture.capture_queries: set it, capture_keys, capture_values or capture_outputs "
            "to true, or nothing is captured",
        )
        _require(
            self.capture_queries or not self.capture_softmax,
            "sniffer.capture.capture_softmax: the statistics are columns of the queries, which are not "
            "captured; capture them too, or do without the statistics",
        )
        for name in ("capture_softmax", "capture_token_strings"):
            _require(
                self.sampler.keeps_rows or not getattr(self, name),
                f"sniffer.capture.{name}: it adds to the rows, and the sampler none keeps none; set it "
                "to false, or choose another sampler",
            )
        _require(
            self.local_positions > 0,
            f"sniffer.capture.local_positions: must be at least 1, got {self.local_positions}",
        )
        _require(
            0 < self.min_bucket_size <= 2**31,
            f"sniffer.capture.min_bucket_size: must lie between 1 and 2^31, got {self.min_bucket_size}",
        )
        # Checked here: jsonargparse would bury an error of the optional dataclass itself.
        _require(
            self.head_sampling is None or self.head_sampling.count > 0,
            "sniffer.capture.head_sampling.count: must be at least 1; set head_sampling to null to "
            "capture every head",
        )
        for name in ("layers", "heads"):
            indices = getattr(self, name)
            _require(
                indices is None or len(indices) > 0,
                f"sniffer.capture.{name}: the list is empty; set it to null to capture all",
            )

    def as_settings(self) -> dict[str, Any]:
        """The section as JSON takes it, without the fields of later versions that are not used."""
        unused = _unused(self, _LATER_FIELDS)
        if not self.capture_softmax:
            unused.add("local_positions")
        settings = {name: value for name, value in asdict(self).items() if name not in unused}
        for name in _unused(self.sampler, _LATER_SAMPLER_FIELDS):
            del settings["sampler"][name]
        return settings


def _unused(section: Any, names: Collection[str]) -> set[str]:
    """Those of some fields of a section that have their defaults."""
    plain = type(section)()
    return {name for name in names if getattr(section, name) == getattr(plain, name)}


@dataclass
class MomentsConfig:
    """Moments of every token: counts, means, covariances, and their link to position."""

    enabled: bool = False
    """Sum moments of all tokens of the captured heads and kinds, beside the rows that are kept."""
    by_bucket: bool = False
    """Sum those of each bucket by themselves."""
    pre_rope: bool = False
    """Sum those of the vectors before the rotary embedding too."""
    cross: bool = False
    """Sum the covariance of each query head with its key head, at equal positions."""

    def __post_init__(self) -> None:
        for name in ("by_bucket", "pre_rope", "cross"):
            _require(
                self.enabled or not getattr(self, name),
                f"sniffer.moments.{name}: no moments are summed; set sniffer.moments.enabled to true",
            )

    def as_settings(self) -> dict[str, bool]:
        """The section as JSON takes it; empty where no moments are summed."""
        return asdict(self) if self.enabled else {}


def require_something(capture: CaptureConfig, moments: MomentsConfig) -> None:
    """See that rows or moments are captured, and that these can be summed.

    Raises:
        UserError: Neither is, or they can't.
    """
    _require(
        not moments.cross or (capture.capture_queries and capture.capture_keys),
        "sniffer.moments.cross: queries and keys are summed together, and one of them is not captured; "
        "set sniffer.capture.capture_queries and capture_keys to true, or cross to false",
    )
    _require(
        not moments.pre_rope or capture.capture_queries or capture.capture_keys,
        "sniffer.moments.pre_rope: values and outputs are not rotated; set "
        "sniffer.capture.capture_queries or capture_keys to true, or pre_rope to false",
    )
    _require(
        capture.sampler.keeps_rows or moments.enabled,
        "sniffer.capture.sampler.type: none keeps no rows, so nothing would be captured; set "
        "sniffer.moments.enabled to true, or choose another sampler",
    )


@dataclass
class OutputConfig:
    """Where the captured vectors go."""

    data_root: str
    """Directory of the per-head Parquet files: a new one, or that of an earlier run."""
    overwrite: bool = False
    """Replace what an earlier run left in data_root."""
    hf_repo_id: str | None = None
    """Hub dataset, OWNER/NAME, that the data root is pulled from and pushed to; null stays local."""
    hf_branch: str | None = None
    """Branch of hf_repo_id for this run; null derives it from the names of model and dataset."""
    private: bool = False
    """Make hf_repo_id private where it is not there yet."""

    def __post_init__(self) -> None:
        _require(bool(self.data_root), "sniffer.output.data_root: name a directory")
        _require(
            not is_address(self.data_root),
            f"sniffer.output.data_root: {self.data_root} is an address; name a directory of this "
            "machine, and copy or push it when the run has ended",
        )
        require_hub_names(self.hf_repo_id, self.hf_branch)


def require_hub_names(repo_id: str | None, branch: str | None) -> None:
    """See that a Hub dataset and its branch are named as the Hub does it; None names none.

    Raises:
        UserError: One is not.
    """
    try:
        is_dataset = repo_id is None or repo_id.count("/") == 1
        validate_repo_id(repo_id or "owner/name")
    except HFValidationError:
        is_dataset = False
    _require(
        is_dataset,
        f"sniffer.output.hf_repo_id: {repo_id} is no name of a Hub dataset; give OWNER/NAME, of "
        "letters, digits and - _ .",
    )
    _require(
        branch != "main",
        "sniffer.output.hf_branch: main has the list of all branches; name another branch",
    )
    _require(
        branch is None or _BRANCH.fullmatch(branch) is not None,
        f"sniffer.output.hf_branch: {branch} is no name of a branch; use letters, digits and - _ .",
    )


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    name: str | None = None
    """Hub id or local directory of the tokenizer; null uses the model's own."""
    max_length: int | None = None
    """Tokens kept from the start of each text; null keeps all."""
    add_special_tokens: bool | None = None
    """Add tokens such as the one that begins a text; null does for texts, and leaves it to the chat
    template for conversations."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with a Hub repository."""
    padding_side: str = "right"
    """Always right: the position of a token is then its index in the sequence."""

    def __post_init__(self) -> None:
        _require(
            self.max_length is None or self.max_length > 0,
            f"data.tokenizer.max_length: must be at least 1 or null, got {self.max_length}",
        )
        _require(
            self.padding_side == "right",
            f"data.tokenizer.padding_side: must be right, got {self.padding_side}; positions are "
            "counted from the start of a sequence, so remove the key",
        )
