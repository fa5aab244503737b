"""What a model can be given: the positions that its config covers, and the tokens that it knows."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from qk_sniffer.errors import UserError


def covered_positions(config: Any) -> int | None:
    """Positions that the RoPE of a model is made for; None without RoPE, or where it has no limit.

    ``max_position_embeddings`` of the text config says how long the texts of the training were, and a
    scaling stretches them:

    - ``linear``, ``dynamic`` and ``proportional`` by their ``factor``, since transformers asks to leave
      ``max_position_embeddings`` as it was. A config with a RoPE for each kind of layer, as Gemma 3's,
      has the factor in it already.
    - ``yarn`` takes ``original_max_position_embeddings`` to ``factor`` times as many, which some
      configs have in ``max_position_embeddings`` and some have not: the larger counts.
    - ``longrope`` and ``llama3`` keep the original length apart, and ``max_position_embeddings`` is
      what they cover. Where it is no larger than the original, as after an override, the factor counts.

    Args:
        config: Of the model, or of its decoder.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    trained = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(trained, int) or not isinstance(rope, Mapping) or not rope:
        return None
    by_kind = [parameters for parameters in rope.values() if isinstance(parameters, Mapping)]
    if not by_kind:
        return _covered(rope, trained, has_factor=False)
    return max(_covered(parameters, trained, has_factor=True) for parameters in by_kind)


def _covered(rope: Mapping[str, Any], trained: int, *, has_factor: bool) -> int:
    """Positions of one RoPE.

    Args:
        rope: Its parameters.
        trained: ``max_position_embeddings``.
        has_factor: Whether that has the factor of a linear scaling in it.
    """
    rope_type = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or trained
    if rope_type in ("linear", "dynamic", "proportional") and not has_factor:
        return max(trained, int(factor * trained))
    if rope_type == "yarn" or (rope_type in ("longrope", "llama3") and trained <= original):
        return max(trained, int(factor * original))
    return trained


def vocabulary_size(backbone: nn.Module) -> int | None:
    """Rows of a backbone's embedding, which need no values; None where it can't be told."""
    for owner in (backbone, getattr(backbone, "decoder", None)):
        try:
            embedding: Any = owner.get_input_embeddings()  # type: ignore[union-attr, operator]
        except (AttributeError, NotImplementedError):
            continue
        rows = getattr(embedding, "num_embeddings", None)
        if isinstance(rows, int):
            return rows
    return config_vocabulary(getattr(backbone, "config", None))


def config_vocabulary(config: Any) -> int | None:
    """Tokens of a model as its config counts them; an embedding may have a few rows more."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def require_known_tokens(smallest: int, largest: int, backbone: nn.Module) -> None:
    """See that a model has an embedding for each token; on a device it would end in an assertion.

    Args:
        smallest: The smallest token id of what it is to read.
        largest: The largest.
        backbone: The model, which may be one without weights.

    Raises:
        UserError: It has not.
    """
    n_known = vocabulary_size(backbone)
    if n_known is not None and not 0 <= smallest <= largest < n_known:
        unknown = smallest if smallest < 0 else largest
        raise UserError(
            f"data.tokenizer.name: a text has the token id {unknown}, and the embedding of "
            f"{type(backbone).__name__} has {n_known} rows, from 0 to {n_known - 1}; name the "
            "tokenizer that belongs to the model"
        )
