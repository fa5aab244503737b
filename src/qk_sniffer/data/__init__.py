"""Texts as batches of tokens, with example ids."""

from qk_sniffer.data.fields import BatchFields, batch_fields, sequence_lengths
from qk_sniffer.data.text_data_module import TextDataModule, TokenBatch

__all__ = ["BatchFields", "TextDataModule", "TokenBatch", "batch_fields", "sequence_lengths"]
