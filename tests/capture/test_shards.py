"""Which heads fall to each of the processes that share a model."""

from dataclasses import replace

import pytest

from qk_sniffer.capture import AttentionLayer, CapturedHeads, ModelShard

LAYERS = [
    AttentionLayer(0, n_keys * group, n_keys, 16) for n_keys in range(1, 9) for group in range(1, 5)
]


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"{layer.num_attention_heads}-{layer.num_key_value_heads}"
)
def test_each_head_falls_to_one_process(layer: AttentionLayer, count: int) -> None:
    shards = [ModelShard(number, count) for number in range(count)]
    queries = [head for shard in shards for head in shard.query_heads(layer)]
    keys = [head for shard in shards for head in shard.key_heads(layer)]
    assert queries == list(range(layer.num_attention_heads))
    assert keys == list(range(layer.num_key_value_heads))
    sizes = [len(shard.query_heads(layer)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"{layer.num_attention_heads}-{layer.num_key_value_heads}"
)
def test_a_process_attends_with_the_key_heads_of_its_query_heads(
    layer: AttentionLayer, count: int
) -> None:
    heads = CapturedHeads(
        layer, tuple(range(layer.num_attention_heads)), tuple(range(layer.num_key_value_heads))
    )
    for number in range(count):
        shard = ModelShard(number, count)
        own, keys = shard.query_heads(layer), shard.computed_keys(layer)
        if not own:
            continue
        part = replace(layer, num_attention_heads=len(own), num_key_value_heads=len(keys))
        assert [keys[part.key_head(place)] for place in range(len(own))] == list(
            map(layer.key_head, own)
        )
        held, mine = shard.held(heads, part), shard.of(heads)
        if len(own) < layer.num_attention_heads:
            assert [own[place] for place in held.query] == list(mine.query)
            assert [keys[place] for place in held.key] == list(mine.key)


def test_where_each_computes_all_heads_they_keep_their_numbers() -> None:
    layer = AttentionLayer(3, 6, 3, 16)
    heads = CapturedHeads(layer, (1, 4, 5), (0, 2))
    assert ModelShard(1, 2).held(heads, layer) == CapturedHeads(layer, (4, 5), (2,))
