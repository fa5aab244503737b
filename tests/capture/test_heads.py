import pytest

from qk_sniffer.capture import AttentionLayer, select_heads
from qk_sniffer.errors import UserError

GQA = [AttentionLayer(i, 8, 2, 16, window) for i, window in enumerate([512, None, 512, None])]


def test_all_heads_by_default() -> None:
    heads = select_heads(GQA)
    assert list(heads) == [0, 1, 2, 3]
    assert heads[0].query == tuple(range(8))
    assert heads[0].key == (0, 1)


def test_key_heads_follow_their_query_heads() -> None:
    heads = select_heads(GQA, layers=[1], heads=[5, 4])
    assert list(heads) == [1]
    assert heads[1].query == (4, 5)
    assert heads[1].key == (1,)


@pytest.mark.parametrize(("key_heads", "expected"), [(1, (0,)), (8, (3, 7))])
def test_mqa_and_mha(key_heads: int, expected: tuple[int, ...]) -> None:
    heads = select_heads([AttentionLayer(0, 8, key_heads, 16)], heads=[3, 7])
    assert heads[0].key == expected


def test_full_attention_only_leaves_out_sliding_layers() -> None:
    assert list(select_heads(GQA, full_attention_only=True)) == [1, 3]


def test_a_draw_is_reproducible_exact_in_number_and_spread() -> None:
    def draw(seed: int) -> set[tuple[int, int]]:
        heads = select_heads(GQA, sample_count=10, sample_seed=seed)
        return {(layer, head) for layer, captured in heads.items() for head in captured.query}

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    draws = [draw(seed) for seed in range(60)]
    assert all(len(drawn) == 10 for drawn in draws)
    assert set().union(*draws) == {(layer, head) for layer in range(4) for head in range(8)}


def test_a_draw_takes_all_heads_of_a_smaller_model() -> None:
    heads = select_heads(GQA, sample_count=1000)
    assert sum(len(captured.query) for captured in heads.values()) == 32


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"layers": [1, 4]}, "layers: the model has no layer 4; choose from 0 to 3"),
        ({"layers": [-1]}, "layers: the model has no layer -1; choose from 0 to 3"),
        ({"heads": [8]}, "heads: the model has no query head 8; choose from 0 to 7"),
        ({"layers": [0, 2], "full_attention_only": True}, "full_attention_only: every chosen layer"),
    ],
)
def test_what_the_model_lacks_is_named(filters: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_heads(GQA, **filters)
