"""Reading captures back: single heads, their rows in any array library, and attention from them."""

from qk_sniffer.reading.attention import Attention, attention_of
from qk_sniffer.reading.captures import Captures
from qk_sniffer.reading.head import Head, finite_rows

__all__ = ["Attention", "Captures", "Head", "attention_of", "finite_rows"]
