"""A batch of tokens: how it is made of encoded texts, moved, and continued."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qk_sniffer.data.fields import batch_fields
from qk_sniffer.data.texts import Row
from qk_sniffer.data.tokenizing import LISTED

_BESIDE = (*LISTED, "messages")
"""Columns that only some texts have, and that no tensor holds."""


class TokenBatch(dict[str, Any]):
    """A batch of which only the tokens move to a device: ids, lengths and mask are read on the host."""

    host_input_ids: torch.Tensor
    """``input_ids`` as they were made, from ``to`` on."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch with ``input_ids`` on ``device``; Lightning calls this for every batch."""
        batch = TokenBatch(self | {"input_ids": self["input_ids"].to(device, non_blocking=True)})
        batch.host_input_ids = self["input_ids"]
        return batch


class Collate:
    """Pads encoded rows on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[Row]) -> TokenBatch:
        """The rows as a batch."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        # A batch of empty texts still needs one column for the forward.
        padded_length = max(1, int(lengths.max()))
        input_ids = torch.full((len(rows), padded_length), self.pad_token_id)
        for index, row in enumerate(rows):
            input_ids.numpy()[index, : len(row["input_ids"])] = row["input_ids"]
        beside: dict[str, Any]
        beside = {name: [row[name] for row in rows] for name in _BESIDE if name in rows[0]}
        if "n_prompt_tokens" in rows[0]:
            beside["n_prompt_tokens"] = torch.tensor([row["n_prompt_tokens"] for row in rows])
        return TokenBatch(
            input_ids=input_ids,
            attention_mask=(torch.arange(padded_length) < lengths[:, None]).to(torch.int64),
            example_ids=torch.tensor([row["example_id"] for row in rows], dtype=torch.int32),
            sequence_lengths=lengths,
            source_ids=[row["source_id"] for row in rows],
            truncated=[row["truncated"] for row in rows],
            **beside,
        )


def batch_with(batch: Mapping[str, Any], new: Sequence[Tensor]) -> TokenBatch:
    """A batch whose texts a model has continued.

    Args:
        batch: Its fields, as ``TextDataModule`` makes them.
        new: The new tokens of each text, (N,) int64 on the host.

    Returns:
        The batch, its tokens on the device where they were, with ``n_prompt_tokens`` (B,) int64; what
        is new is a message of the assistant where there are messages.
    """
    fields = batch_fields(batch)
    prompts = fields.sequence_lengths
    lengths = prompts + torch.tensor([tokens.numel() for tokens in new])
    width = max(1, int(lengths.max()))
    input_ids = torch.zeros((len(new), width), dtype=torch.int64)
    rows = zip(input_ids, fields.input_ids, prompts.tolist(), new, strict=True)
    for row, text, n_prompt, tokens in rows:
        row[:n_prompt] = text[:n_prompt]
        row[n_prompt : n_prompt + tokens.numel()] = tokens
    continued = TokenBatch(
        {
            **batch,
            "input_ids": input_ids,
            "attention_mask": (torch.arange(width) < lengths[:, None]).to(torch.int64),
            "sequence_lengths": lengths,
            "n_prompt_tokens": prompts,
        }
    )
    places = list(zip(prompts.tolist(), lengths.tolist(), strict=True))
    if "messages" in batch:
        continued["messages"] = [
            [
                *messages,
                *([{"role": "assistant", "start": start, "stop": stop}] if stop > start else []),
            ]
            for messages, (start, stop) in zip(batch["messages"], places, strict=True)
        ]
    if "positions" in batch:
        continued["positions"] = [
            np.asarray(positions)[np.asarray(positions) < stop]
            for positions, (_, stop) in zip(batch["positions"], places, strict=True)
        ]
    return continued.to(batch["input_ids"].device)
