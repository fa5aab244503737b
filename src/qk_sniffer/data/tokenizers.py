"""The tokenizer of a run: where it comes from, and its chat template."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qk_sniffer.config import TokenizerConfig, explained_loading
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.models import ModelSource, tokenizer_source

log = logging.getLogger(__name__)


def load_tokenizer(
    config: TokenizerConfig,
    module: Any,
    given: PreTrainedTokenizerBase | None,
    chat_template: str | None,
) -> PreTrainedTokenizerBase:
    """A tokenizer of a run's own, which cuts on the right.

    Args:
        config: The section tokenizer.
        module: That of the trainer, which has one where the section names none.
        given: One that is loaded already and comes before all others.
        chat_template: File with the template that takes the place of its own; None keeps that.

    Raises:
        UserError: There is no tokenizer, or the file can't be read.
    """
    if given is None and config.name is None:
        given = getattr(module, "tokenizer", None)
    tokenizer = _load(config, module) if given is None else deepcopy(given)
    tokenizer.truncation_side = "right"
    if chat_template is not None:
        tokenizer.chat_template = _read(chat_template)
    return tokenizer


def warn_of_date(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
    """Say that another day has other texts, where a chat template asks for the date.

    Args:
        tokenizer: Has the template.
        kwargs: What the template is given besides.
    """
    if "strftime_now" in str(tokenizer.chat_template) and "date_string" not in kwargs:
        log.warning(
            "data.chat_template_kwargs: the chat template may write the date of today, so that a "
            "run of another day has other texts; set {date_string: ...} to the date that it is to write"
        )


def _load(config: TokenizerConfig, module: Any) -> PreTrainedTokenizerBase:
    source = _source(config, module)
    field = "model.name" if config.name is None else "data.tokenizer.name"
    with explained_loading(
        f"{field}: no tokenizer can be loaded from {source.name}",
        "name a local directory or a Hub id that you can reach and that has one",
        source.name,
    ):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source.kwargs())
    return tokenizer


def _source(config: TokenizerConfig, module: Any) -> ModelSource:
    if config.name is not None:
        return ModelSource(config.name, trust_remote_code=config.trust_remote_code)
    source = getattr(module, "source", None)
    if not isinstance(source, ModelSource):
        raise UserError(
            "data.tokenizer.name: null takes the tokenizer of the trainer's SnifferModule, and "
            "there is none here; name a tokenizer"
        )
    trust = source.trust_remote_code or config.trust_remote_code
    return replace(tokenizer_source(source), trust_remote_code=trust)


def _read(chat_template: str) -> str:
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: {chat_template} can't be read ({first_line(error)}); name a file "
            "with a Jinja template"
        ) from error
