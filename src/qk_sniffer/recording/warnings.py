"""What a person should know of a run before it begins, though nothing forbids it."""

from collections.abc import Iterator

from torch import Tensor

from qk_sniffer.capture import Sampler, keep_probabilities

_STRETCH = "stretch its positions by YaRN in model.config_overrides"


def forewarnings(sampler: Sampler, lengths: Tensor, n_positions: int | None) -> Iterator[str]:
    """One line for each.

    Args:
        sampler: Which positions are kept.
        lengths: (N,) int64, tokens in each text that is to be read.
        n_positions: Positions that the model covers; None for any number.
    """
    if lengths.numel() == 0:
        return
    if n_positions is not None and (n_beyond := int((lengths > n_positions).sum())):
        yield (
            f"data.tokenizer.max_length: {n_beyond:,} of {lengths.numel():,} texts are longer than the "
            f"{n_positions:,} positions that the model's config covers, the longest has "
            f"{int(lengths.max()):,} tokens; set max_length to {n_positions}, or {_STRETCH}"
        )
    # A longer text keeps what its beginning keeps, so that more than half of the texts keep no more.
    typical = int(lengths.sort().values[lengths.numel() // 2])
    rows = float(keep_probabilities(sampler, typical).sum())
    if rows < 1:
        yield (
            "sniffer.capture.sampler: of most texts a head is expected to keep less than one row, "
            f"{rows:.2g} of the {typical:,} tokens of a typical one; set sniffer.capture.sampler.type: "
            "all for short texts, or raise base_rate"
        )


def beyond_positions(longest: int, n_positions: int) -> str:
    """The line for the first such text of a stream, whose lengths are not known beforehand."""
    return (
        f"data.tokenizer.max_length: a text of {longest:,} tokens is longer than the {n_positions:,} "
        f"positions that the model's config covers; the card will count them all; set max_length to "
        f"{n_positions}, or {_STRETCH}"
    )
