"""The model and the texts that are captured, and what is captured of them."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from qk_sniffer.config import CaptureConfig, SamplerConfig, TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule
from smollm2 import gguf_file

DOCUMENTS, TOKENS, BATCH_SIZE = 8, 1024, 2


def config(sampler: str, min_bucket_size: int) -> CaptureConfig:
    return CaptureConfig(min_bucket_size=min_bucket_size, sampler=SamplerConfig(type=sampler))


ALL = config("all", 128)
UNIFORM = config("uniform", 128)


@cache
def model() -> SnifferModule:
    path = gguf_file()
    return SnifferModule(str(path.parent), gguf_file=path.name, dtype="float32")


@contextlib.contextmanager
def text_files(lengths: Sequence[int]) -> Iterator[str]:
    """A directory of real text in files of so many characters, each from another place."""
    text = "\n\n".join(topics.values())
    distance = len(text) // len(lengths)
    with tempfile.TemporaryDirectory() as directory:
        for number, length in enumerate(lengths):
            content = text[number * distance :][:length]
            (Path(directory) / f"{number:02d}.txt").write_text(content, encoding="utf-8")
        yield directory


def long_files(count: int) -> contextlib.AbstractContextManager[str]:
    """A directory of ``count`` files, each longer than what is read of it."""
    return text_files([sum(map(len, topics.values())) // count] * count)


def documents(count: int) -> contextlib.AbstractContextManager[TextDataModule]:
    """``count`` texts of ``TOKENS`` tokens each."""
    return long_texts(count, TOKENS, BATCH_SIZE)


@contextlib.contextmanager
def long_texts(count: int, length: int, batch_size: int = 1) -> Iterator[TextDataModule]:
    """``count`` texts of ``length`` tokens each."""
    with long_files(count) as directory:
        tokenizer = TokenizerConfig(max_length=length)
        data = TextDataModule(directory, tokenizer=tokenizer, batch_size=batch_size)
        yield data
        lengths = data.sequence_lengths()
        assert lengths is not None and bool((lengths == length).all()), "a text is too short"
