import pytest
import torch

from qk_sniffer.capture import compute_positions
from qk_sniffer.errors import UserError


def positions(*args, **kwargs) -> tuple[list[int], list[int]]:
    queries, keys = compute_positions(*args, **kwargs)
    assert queries.dtype == keys.dtype == torch.int64
    return queries.tolist(), keys.tolist()


def test_a_plain_forward_counts_from_zero() -> None:
    assert positions(4, 4) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_a_cache_makes_keys_longer_than_queries() -> None:
    assert positions(2, 5) == ([3, 4], [0, 1, 2, 3, 4])
    assert positions(1, 5) == ([4], [0, 1, 2, 3, 4])


def test_a_static_cache_has_free_slots_behind_the_new_tokens() -> None:
    assert positions(2, 8, cache_position=torch.tensor([3, 4])) == ([3, 4], list(range(8)))


def test_a_full_sliding_cache_holds_the_last_tokens() -> None:
    assert positions(2, 5, cache_position=torch.tensor([7, 8])) == ([7, 8], [4, 5, 6, 7, 8])
    assert positions(1, 4, cache_position=torch.tensor([9])) == ([9], [6, 7, 8, 9])


def test_explicit_positions_win() -> None:
    ids = torch.tensor([[10, 11, 12]] * 2)
    assert positions(3, 3, position_ids=ids) == ([10, 11, 12], [10, 11, 12])
    assert positions(2, 4, cache_position=torch.tensor([7, 8])) == ([7, 8], [5, 6, 7, 8])
    both = positions(1, 1, position_ids=torch.tensor([[3]]), cache_position=torch.tensor([9]))
    assert both == ([9], [9])


def test_left_padded_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"^position_ids: .*pad sequences on the right"):
        compute_positions(3, 3, position_ids=torch.tensor([[0, 1, 2], [1, 1, 0]]))
