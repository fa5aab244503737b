"""What a dataset card says of moments."""

from collections.abc import Mapping
from typing import Any

from qk_sniffer.kinds import KINDS
from qk_sniffer.storage.card_configs import moments_config
from qk_sniffer.storage.manifest import describe_moments

_TABLE = """\
| column | type | meaning |
|---|---|---|
| layer_idx, head | int32 | as in the names of the heads |
| bucket | int32 | bucket of the positions; null for all of them |
| pre_rope | bool | whether the vectors are those before the rotary embedding |
| count | int64 | tokens |
| position_sum, position_square_sum | int64, float64 | of their positions, and of the squares of these |
| mean | list<float64> | D numbers |
| covariance | list<float64> | D x D, row by row; sums are divided by the count |
| position_covariance | list<float64> | D: the covariance of each number with the position |"""

_KEY_ROWS = """
| key_mean | list<float64> | of queries: the mean of the keys that the head attends to |
| key_covariance | list<float64> | of queries: D x D, query by key at equal positions, row by row |"""


def moments_section(manifest: Mapping[str, Any]) -> str:
    """The section about moments; empty where there are none."""
    counted = describe_moments(manifest)
    if counted is None:
        return ""
    settings = manifest["settings"]["moments"]
    kinds = [kind for kind in KINDS if kind in manifest["moments"]]
    configs = " and ".join(f"`{moments_config(kind)}`" for kind in kinds)
    rows = "a head and bucket" if settings["by_bucket"] else "a head"
    return f"""\
## Moments

Means and covariances of the vectors of {counted}, kept or not: a row {rows}, in the configs
{configs}. With many buckets or stages a head has several rows.

{_TABLE}{_KEY_ROWS * settings["cross"]}

"""
