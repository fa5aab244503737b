"""Reading captures back: single heads, their rows in any array library, and attention from them."""

from qk_sniffer.reading.attention import Attention, attention_of
from qk_sniffer.reading.captures import Captures
from qk_sniffer.reading.head import Head, finite_rows
from qk_sniffer.reading.maps import HeadMap, SoftmaxMean, softmax_means
from qk_sniffer.reading.moments import Components, MomentDifference, Moments

__all__ = [
    "Attention",
    "Captures",
    "Components",
    "Head",
    "HeadMap",
    "MomentDifference",
    "Moments",
    "SoftmaxMean",
    "attention_of",
    "finite_rows",
    "softmax_means",
]
