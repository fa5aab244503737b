"""Texts as batches of tokens, with example ids."""

from qk_sniffer.data.conversations import template_text
from qk_sniffer.data.fields import BatchFields, batch_fields, sequence_lengths
from qk_sniffer.data.text_data_module import TextDataModule
from qk_sniffer.data.token_batch import TokenBatch, batch_with

__all__ = [
    "BatchFields",
    "TextDataModule",
    "TokenBatch",
    "batch_fields",
    "batch_with",
    "sequence_lengths",
    "template_text",
]
