"""Compress a text by two files of statistics, in an environment that has kvpress and not qk-sniffer.

``python in_kvpress.py MODEL TEXTS STATISTICS N_SINK OUT``: kvpress loads STATISTICS, collects its own
of the texts in the directory TEXTS, in its own way, and compresses a text by each. OUT gets both, as
kvpress has them in memory, the scores of the keys of all layers, and which of them stay.
"""

import sys
from pathlib import Path

import torch
from kvpress import ExpectedAttentionStatsPress
from kvpress.presses.expected_attention_with_stats import ExpectedAttentionStats, collect_queries
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_CHARACTERS = 1_000
RATIO = 0.5


@torch.no_grad()
def main(directory: str, texts: str, statistics: str, n_sink: str, out: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    n_texts = sum(bool(line) for file in Path(texts).iterdir() for line in file.open())
    own = f"{out}-statistics"
    collect(model, texts, n_texts, int(n_sink)).save_pretrained(own)
    text = AutoTokenizer.from_pretrained(directory)(Path(__file__).read_text(), return_tensors="pt")
    tokens = text["input_ids"][:, :256]
    found = {"ours": compressed(model, tokens, statistics), "theirs": compressed(model, tokens, own)}
    torch.save(found, out)


def collect(model: torch.nn.Module, texts: str, n_texts: int, n_sink: int) -> ExpectedAttentionStats:
    """Statistics by kvpress's own code."""
    _, mean, covariance = collect_queries(model, texts, n_texts, MOST_CHARACTERS, n_sink, "text")
    config = model.config
    found = ExpectedAttentionStats(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        dataset_name=texts,
        model_name=config.name_or_path,
        num_samples=n_texts,
        sample_seq_len=MOST_CHARACTERS,
        n_sink=n_sink,
    )
    found.query_mean.data, found.query_cov.data = mean, covariance
    return found


def compressed(model: torch.nn.Module, tokens: torch.Tensor, statistics: str) -> dict:
    """What a press has loaded, the scores that it gives the keys of each layer, and which keys stay."""
    scores = []

    class Press(ExpectedAttentionStatsPress):
        def score(self, *args: object, **kwargs: object) -> torch.Tensor:
            scores.append(super().score(*args, **kwargs))
            return scores[-1]

    press = Press(compression_ratio=RATIO, stats_folder=statistics)
    with press(model):
        model(tokens, use_cache=True)
    found = torch.cat(scores)
    n_kept = int(RATIO * found.shape[-1])
    is_kept = torch.zeros_like(found, dtype=torch.bool).scatter_(-1, found.topk(n_kept).indices, True)
    config = ExpectedAttentionStats.from_pretrained(statistics)
    names = ("dataset_name", "model_name", "num_samples", "sample_seq_len", "n_sink")
    return {
        "mean": press.mu,
        "covariance": press.cov,
        "scores": found,
        "is_kept": is_kept,
        "config": {name: getattr(config, name) for name in names},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
