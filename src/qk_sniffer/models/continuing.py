"""Continues texts by a model's own ``generate``, each with random numbers of its own."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qk_sniffer.errors import UserError, did_you_mean, first_line
from qk_sniffer.models.apart import must_be_read_alone
from qk_sniffer.models.attention import decoder_backbone
from qk_sniffer.models.frequencies import depends_on_length, forget_lengths
from qk_sniffer.models.generating import watch_stopping
from qk_sniffer.models.tensor_parallel import n_sharing, too_large_to_share
from qk_sniffer.models.wrapping import wrapped

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")
_ONE_EACH = ("num_beams", "num_return_sequences", "num_beam_groups")
_UNUSABLE = (
    "return_dict_in_generate",
    "stop_strings",
    "token_healing",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
)
_PADDING, _OPENING = 7, 256


def text_seed(seed: int, example_id: int) -> int:
    """The seed of torch's generator for one text: the model draws the same tokens of it in any batch.

    It is the 4-byte Blake2b digest of ``"SEED EXAMPLE_ID"`` in decimal, little-endian.
    """
    digest = hashlib.blake2b(f"{seed} {example_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generate_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``generate`` is given, without the seed.

    A parameter of sampling, such as temperature, sets do_sample where the settings don't.

    Args:
        settings: The field model.generate.

    Raises:
        UserError: A setting is missing, unknown, out of range, or would give a text several
            continuations.
    """
    options = {name: value for name, value in settings.items() if name != "seed"}
    known = GenerationConfig().to_dict()
    for name in options:
        if name in _UNUSABLE or name.startswith("output_"):
            raise UserError(f"model.generate.{name}: a run can't use it; leave it out")
        if name.endswith("_token_id") and not _is_token(options[name]):
            raise UserError(
                f"model.generate.{name}: expected a token id or a list of them, got {options[name]!r}; "
                "see the tokenizer's vocabulary"
            )
        if name not in known:
            remedy = did_you_mean(name, known, "see GenerationConfig of transformers")
            raise UserError(f"model.generate.{name}: generate has no such setting; {remedy}")
    most = options.get("max_new_tokens")
    if not _is_integer(most, 1):
        raise UserError(
            f"model.generate.max_new_tokens: must be an integer of at least 1, got {most}; it bounds "
            "what a run may take"
        )
    for name in _ONE_EACH:
        if options.get(name, 1) != 1:
            raise UserError(
                f"model.generate.{name}: a text has one continuation; leave it out, and give the text "
                "several ids to have several"
            )
    seed = settings.get("seed", 0)
    if not _is_integer(seed, 0):
        raise UserError(f"model.generate.seed: must be an integer of at least 0, got {seed}")
    if any(name in options for name in _SAMPLING):
        options.setdefault("do_sample", True)
    try:
        GenerationConfig(**options)
    except (TypeError, ValueError) as error:
        raise _refused(error) from error
    return options


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_token(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or all(_is_integer(token, 0) for token in values)


def _refused(error: Exception) -> UserError:
    return UserError(
        f"model.generate: these settings can't be used ({first_line(error)}); see GenerationConfig of "
        "transformers"
    )


def require_room(n_positions: int | None, longest: int, n_new_tokens: int) -> None:
    """See that a model has positions for a text and for what it adds.

    Args:
        n_positions: Positions that the model covers; None for any number.
        longest: Tokens of the longest text with all that may be added.
        n_new_tokens: What may be added.

    Raises:
        UserError: It has not.
    """
    if n_positions is not None and longest > n_positions:
        raise UserError(
            f"model.generate.max_new_tokens: a text of {longest - n_new_tokens:,} tokens and "
            f"{n_new_tokens:,} new ones are more than the {n_positions:,} positions that the model "
            "covers; lower it or data.tokenizer.max_length, or stretch the positions by "
            "model.config_overrides"
        )


class Continuation:
    """Continues the texts of a batch together.

    Those that are shorter are padded on the left. A model that lets its tokens attend to the padding,
    or computes a text otherwise in company, continues one text at a time.

    Args:
        model: With its language-model head.
        settings: As ``generate_options`` takes them.
        prefill_chunk_size: Tokens of a text that it reads at a time; None for all.

    Raises:
        UserError: The model can't generate.
    """

    def __init__(
        self, model: PreTrainedModel, settings: Mapping[str, Any], prefill_chunk_size: int | None
    ) -> None:
        if not model.can_generate():
            raise UserError(
                f"model.generate: {type(model).__name__} can't generate; leave it out, or name another "
                "model"
            )
        self._model = model
        self._seed = settings.get("seed", 0)
        self._options = generate_options(settings)
        if prefill_chunk_size is not None:
            self._options.setdefault("prefill_chunk_size", prefill_chunk_size)
        config = model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        found = (t for t in (config.pad_token_id, *ends) if t is not None)
        if self._options.get("pad_token_id") is None:
            self._options["pad_token_id"] = next(found, 0)
        self._options["return_dict_in_generate"] = False
        self._backbone = decoder_backbone(model)
        self._one_at_a_time: bool | None = True if must_be_read_alone(self._backbone) else None

    def __call__(self, texts: Sequence[Tensor], example_ids: Sequence[int]) -> list[Tensor]:
        """The new tokens of each text, with the one that ends it: (N,) int64 on the host.

        An empty text stays empty.

        Args:
            texts: (S,) int64 each, on any device.
            example_ids: Theirs.

        Raises:
            UserError: A text does not fit into the device's memory.
        """
        new = [torch.empty(0, dtype=torch.int64)] * len(texts)
        some = [number for number, text in enumerate(texts) if text.numel()]
        if len({texts[number].numel() for number in some}) > 1 and self._one_at_a_time is None:
            is_changed = depends_on_length(self._backbone) or self._reads_padding(texts[some[0]])
            self._one_at_a_time = is_changed
        groups = [[number] for number in some] if self._one_at_a_time else [some] if some else []
        for group in groups:
            found = self._continue([texts[n] for n in group], [example_ids[n] for n in group])
            for number, tokens in zip(group, found, strict=True):
                new[number] = tokens
        return new

    def _continue(self, texts: Sequence[Tensor], example_ids: Sequence[int]) -> list[Tensor]:
        """As the call does; where the device runs out of memory, in halves."""
        try:
            return self._generate(texts, example_ids)
        # What it says of a setting that it can't use, here or on this device.
        except (AssertionError, ValueError) as error:
            raise _refused(error) from error
        except torch.OutOfMemoryError as error:
            if n_sharing(self._model) > 1:
                longest = max(text.numel() for text in texts)
                raise too_large_to_share(len(texts), longest) from error
            if len(texts) == 1:
                raise UserError(
                    f"model.generate: a text of {texts[0].numel():,} tokens and what is added to it do "
                    "not fit into the device's memory; lower max_new_tokens or "
                    "data.tokenizer.max_length, or spread the model with model.device_map: auto"
                ) from error
        # Here and not in the handler, where the error holds the tensors of the forward.
        torch.cuda.empty_cache()
        middle = (len(texts) + 1) // 2
        return [
            *self._continue(texts[:middle], example_ids[:middle]),
            *self._continue(texts[middle:], example_ids[middle:]),
        ]

    def _generate(self, texts: Sequence[Tensor], example_ids: Sequence[int]) -> list[Tensor]:
        forget_lengths(self._backbone)
        width = max(text.numel() for text in texts)
        ends: list[list[bool]] = []
        with ExitStack() as stack:
            stack.enter_context(watch_stopping(ends.append))
            draw = partial(_drawing_apart, self._generators(texts[0].device, example_ids))
            stack.enter_context(wrapped(vars(torch), "multinomial", draw))
            sequences = self._model.generate(**self._padded(texts, width), **self._options)
        new = sequences[:, width:].cpu()
        has_ended = torch.tensor(ends)
        # A text ends with its first token that ends one; what comes behind is padding.
        n_new = (has_ended.cumsum(0) == 0).sum(0) + 1
        return [row[:size] for row, size in zip(new, n_new.tolist(), strict=True)]

    def _generators(self, device: torch.device, example_ids: Sequence[int]) -> list[torch.Generator]:
        seeds = [text_seed(self._seed, example_id) for example_id in example_ids]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def _padded(self, texts: Sequence[Tensor], width: int) -> dict[str, Tensor]:
        """Texts side by side, padded on the left, and which of their places are tokens."""
        device = texts[0].device
        input_ids = torch.full((len(texts), width), self._options["pad_token_id"], device=device)
        for row, text in zip(input_ids, texts, strict=True):
            row[width - text.numel() :] = text
        lengths = torch.tensor([text.numel() for text in texts], device=device)
        is_token = torch.arange(width, device=device) >= width - lengths[:, None]
        return {"input_ids": input_ids, "attention_mask": is_token.to(torch.int64)}

    def _reads_padding(self, text: Tensor) -> bool:
        """Whether padding on the left changes what the model would add to a text."""
        opening = text[:_OPENING]
        try:
            alone, padded = (
                self._second_logits(opening, opening.numel() + padding) for padding in (0, _PADDING)
            )
        # Some models fail on such a batch, each in its own way.
        except Exception:
            is_changed = True
        else:
            tolerance = 1e-3 if alone.dtype == torch.float32 else 0.1
            difference = float((alone - padded).float().norm() / alone.float().norm())
            is_changed = not difference < tolerance
        if is_changed:
            log.warning(
                "model.generate: %s reads the padding of shorter texts, so texts are continued one at "
                "a time",
                type(self._model).__name__,
            )
        return is_changed

    def _second_logits(self, text: Tensor, width: int) -> Tensor:
        """What the model makes of a padded text and the first token that it has added.

        That token is read with a cache, where some models forget the padding.
        """
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
        output: Any = self._model.generate(
            **self._padded([text], width),
            **options,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self._options["pad_token_id"],
        )
        logits: Tensor = output.logits[1]
        return logits


def _drawing_apart(
    generators: Sequence[torch.Generator], original: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """``torch.multinomial`` that draws each row with a generator of its own."""

    @wraps(original)
    def draw(probs: Tensor, num_samples: int, **kwargs: Any) -> Tensor:
        return torch.stack(
            [
                original(row, num_samples, **(kwargs | {"generator": generator}))
                for row, generator in zip(probs, generators, strict=True)
            ]
        )

    return draw
