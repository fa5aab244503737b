"""SnifferModule: loads a causal language model and runs its backbone over batches of tokens."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from qk_sniffer.capture import (
    AttentionLayer,
    ModelShard,
    Sniffer,
    get_active_sniffer,
    heads_to_capture,
)
from qk_sniffer.data import batch_fields, batch_with, sequence_lengths
from qk_sniffer.errors import UserError
from qk_sniffer.models import (
    Continuation,
    ModelSource,
    SharedModel,
    attention_geometry,
    base_of,
    capture_attention,
    config_vocabulary,
    covered_positions,
    decoder_backbone,
    depends_on_length,
    foreign_base,
    frequencies_for,
    generate_options,
    load_config,
    load_model,
    load_skeleton,
    model_overlays,
    must_be_read_alone,
    name_of,
    plan_of,
    read_in_passages,
    require_known_tokens,
    require_plan,
    require_room,
    spans_of_like_frequencies,
    too_large_to_share,
    transformers_model,
    whole_layers,
)
from qk_sniffer.processes import Ranks

log = logging.getLogger(__name__)

Continues = Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]


class SnifferModule(pl.LightningModule):
    """A causal language model whose backbone reads text so that its attention can be captured.

    Only the backbone is captured: without mask (sequences are padded on the right), without the
    language-model head, and without a cache unless it reads in passages. The weights are loaded when
    the trainer asks for the model.

    Args:
        name: Hub id or local directory of the model, or of a PEFT adapter, which names its base.
        revision: Branch, tag or commit of a Hub model.
        gguf_file: GGUF file of the model, loaded with dequantized weights; null loads safetensors.
        dtype: Number format of weights and activations; auto takes the checkpoint's own.
        attn_implementation: Attention of transformers, such as eager or sdpa; null lets it choose.
        trust_remote_code: Run model code that comes with a Hub repository.
        device_map: Placement by accelerate, such as auto, in one process; null leaves it to trainer.
        config_overrides: Values set on the model's config before it is built, such as rope_scaling.
        models_dir: Directory of modeling files of your own, <arch>/modeling_<arch>.py, that take the
            place of those in transformers.
        prefill_chunk_size: Tokens that the model reads at a time, keeping a cache, so that a long text
            fits a small device; null reads each batch at once.
        generate: Settings of generate, max_new_tokens at least, and a seed: the model first continues
            each text, and then reads it with what it has added; null reads texts as they are.
        quantization: Weights in few bits, as the quantization_config of transformers, such as
            load_in_4bit; null loads them as the checkpoint has them.
        adapter: Hub id or local directory of a PEFT adapter of the model; null for none.
        adapter_revision: Branch, tag or commit of a Hub adapter.
        merge_adapter: Add the adapter to the model's weights, instead of computing it beside them.
        tensor_parallel: Neighbouring processes that share the model, each with some of its attention
            heads, and read the same batches; the others share the texts. 1 gives each a model.
    """

    backbone: nn.Module
    """The decoder below the language-model head, from ``configure_model`` on; it is not registered."""

    def __init__(
        self,
        name: str,
        revision: str = "main",
        gguf_file: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | None = None,
        config_overrides: dict[str, Any] | None = None,
        models_dir: str | None = None,
        prefill_chunk_size: int | None = None,
        generate: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        adapter: str | None = None,
        adapter_revision: str = "main",
        merge_adapter: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise UserError(
                f"model.name: expected the id or directory of a model, got {type(name).__name__}; "
                "for one that is loaded already make SnifferModule.of(model, tokenizer)"
            )
        if prefill_chunk_size is not None and prefill_chunk_size < 1:
            raise UserError(
                f"model.prefill_chunk_size: must be at least 1 or null, got {prefill_chunk_size}"
            )
        if generate is not None:
            generate_options(generate)
        if tensor_parallel < 1:
            raise UserError(f"model.tensor_parallel: must be at least 1, got {tensor_parallel}")
        # The callback gives loggers the settings; Lightning would merge those of module and data.
        self.save_hyperparameters(logger=False)
        self.source = base_of(
            ModelSource(
                name,
                revision,
                gguf_file,
                trust_remote_code,
                quantization,
                adapter,
                adapter_revision,
                merge_adapter,
            )
        )
        if adapter is None and self.source.adapter is not None:
            # Settings are those of a run that names base and adapter.
            fields = ("name", "revision", "adapter", "adapter_revision")
            self.hparams.update({field: getattr(self.source, field) for field in fields})
        self._too_large = math.inf

    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer of a model that was loaded already."""

    continuation: Continues | None = None
    """Gives the new tokens of some texts, by their tokens and example ids; None adds none."""

    _model: PreTrainedModel | None = None
    _plan: Mapping[str, str] | None = None
    _whole_layers: Sequence[AttentionLayer] = ()

    @property
    def tensor_parallel(self) -> int:
        """Neighbouring processes that share the model."""
        return int(self.hparams["tensor_parallel"])

    @property
    def max_new_tokens(self) -> int:
        """Tokens that may be added to each text."""
        generate = self.hparams["generate"]
        return 0 if generate is None else int(generate["max_new_tokens"])

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prefill_chunk_size: int | None = None,
        generate: dict[str, Any] | None = None,
    ) -> "SnifferModule":
        """A module around a model that is loaded already; it is put into eval mode.

        A digest of its weights tells its runs from those of other models of the same name.

        Args:
            model: A causal language model of transformers, also inside PEFT's or another wrapper. One
                that is spread over devices stays where it is, others go to the trainer's.
            tokenizer: What a data module uses that names none.
            prefill_chunk_size: As of the class.
            generate: As of the class.

        Raises:
            UserError: There is no such model, or its architecture can't be captured.
        """
        inner = transformers_model(model)
        module = cls(
            name_of(inner),
            dtype=str(inner.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            attn_implementation=getattr(inner.config, "_attn_implementation", None),
            device_map="as it was loaded" if hasattr(inner, "hf_device_map") else None,
            prefill_chunk_size=prefill_chunk_size,
            generate=generate,
        )
        module._take(inner.eval())
        module.tokenizer = tokenizer
        return module

    @property
    def _is_loaded(self) -> bool:
        return hasattr(self, "backbone")

    def check_model(self) -> None:
        """See from the model's config alone that it can be captured.

        Raises:
            UserError: It can't be found, or its architecture is one that can't be captured.
        """
        with model_overlays(self.hparams["models_dir"]):
            load_config(self.source, self.hparams["config_overrides"])

    def check_tokens(self, smallest: int, largest: int) -> None:
        """See that the model has an embedding for each token, before its weights are loaded.

        Args:
            smallest: The smallest token id of the texts.
            largest: The largest.

        Raises:
            UserError: It has not.
        """
        if self._is_loaded:
            require_known_tokens(smallest, largest, self.backbone)
            return
        with model_overlays(self.hparams["models_dir"]):
            n_known = config_vocabulary(load_config(self.source, self.hparams["config_overrides"]))
        if n_known is not None and not 0 <= smallest <= largest < n_known:
            # The embedding may have more rows than the config says.
            require_known_tokens(smallest, largest, decoder_backbone(self.skeleton()))

    def check_heads(self, capture: Mapping[str, Any]) -> None:
        """See that the model has the layers and heads that a config names, before weights are loaded.

        Args:
            capture: The section capture, as a mapping.

        Raises:
            UserError: It has not.
        """
        # Those of a loaded model are looked up when a run begins, as all are.
        if self._is_loaded or (capture["layers"] is None and capture["heads"] is None):
            return
        try:
            layers = self._whole_layers or attention_geometry(decoder_backbone(self.skeleton())).layers
        # Where a model's code needs the weights' values, the heads are looked up once they are loaded.
        except Exception:
            return
        heads_to_capture(capture, layers)

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, as ``load_skeleton`` gives it.

        Raises:
            UserError: Its config can't be found or used.
        """
        hparams = self.hparams
        with model_overlays(hparams["models_dir"]):
            return load_skeleton(
                self.source,
                dtype=hparams["dtype"],
                attn_implementation=hparams["attn_implementation"],
                config_overrides=hparams["config_overrides"],
            )

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """See that the trainer leaves the model as it is.

        Raises:
            UserError: It would cast it, each of several processes would spread it over all devices, or
                its processes can't share it.
        """
        precision = trainer.precision
        if precision != "32-true":
            raise UserError(
                f"trainer.precision: {precision} would also cast RoPE's frequencies; leave it at "
                "32-true and set model.dtype"
            )
        device_map = self.hparams["device_map"]
        if device_map is not None and trainer.num_devices > 1:
            raise UserError(
                f"model.device_map: {device_map} gives one process all devices of its host, and the "
                f"trainer has {trainer.num_devices} processes there; set trainer.devices to 1, or "
                "device_map to null for a model on each device"
            )
        if self.tensor_parallel > 1:
            self._check_shared(trainer.num_devices)

    def _check_shared(self, n_devices: int) -> None:
        """See that so many processes of a host can share the model, before its weights are loaded."""
        count = self.tensor_parallel
        if n_devices % count:
            raise UserError(
                f"model.tensor_parallel: {count} processes share a model, and the trainer has "
                f"{n_devices} on each host; set trainer.devices to a multiple of {count}"
            )
        for name in ("quantization", "adapter"):
            if self.hparams[name] is not None:
                raise UserError(
                    f"model.{name}: processes that share a model can't use it; set it to null, or "
                    "model.tensor_parallel to 1"
                )
        if self._plan is not None:
            return
        skeleton = self.skeleton()
        self._whole_layers = attention_geometry(decoder_backbone(skeleton)).layers
        self._plan = plan_of(skeleton)
        require_plan(self.source.name, skeleton, self._whole_layers, count)

    def whole_layers(self, held: Sequence[Sequence[AttentionLayer]]) -> list[AttentionLayer]:
        """The attention layers of a model that several processes share.

        Args:
            held: Those that each of them has, in their order.

        Raises:
            UserError: They have not the heads that fall to them.
        """
        return whole_layers(held, self._whole_layers)

    def setup(self, stage: str) -> None:
        """Refuse trainer settings that would change the model's numbers."""
        Ranks.of(self.trainer).run(lambda: self.check_trainer(self.trainer))

    def configure_model(self) -> None:
        """Load the weights, straight to their device; a second call at most moves them there."""
        if self._is_loaded:
            if self.hparams["device_map"] is None:
                (self.backbone if self._model is None else self._model).to(self.device)  # type: ignore[arg-type]
            return
        ranks = Ranks.of(self._trainer)
        if not ranks.is_first:
            disable_progress_bar()
        shared = None
        if ranks.model_size > 1:
            assert self._plan is not None
            shard = ModelShard(ranks.shard, ranks.model_size)
            shared = SharedModel(shard, self.device, self._plan, self._whole_layers)
        load = partial(self._load, shared)
        if Path(self.source.name).exists():
            ranks.run(load)
        else:
            ranks.after_first(load)
        if ranks.is_first and (base := foreign_base(self.source)) is not None:
            log.warning(
                "model.adapter: %s was trained on %s, and its weights fit %s too; see that these are "
                "the same model",
                self.source.adapter,
                base,
                self.source.name,
            )

    def _load(self, shared: SharedModel | None) -> None:
        hparams = self.hparams
        with model_overlays(hparams["models_dir"]):
            model = load_model(
                self.source,
                dtype=hparams["dtype"],
                attn_implementation=hparams["attn_implementation"],
                device_map=hparams["device_map"] or {"": str(self.device)},
                config_overrides=hparams["config_overrides"],
                shared=shared,
            )
        self._take(model)

    def _take(self, model: PreTrainedModel) -> None:
        """Keep the decoder, and all of the model where it continues texts."""
        # Not registered as submodules: Lightning would move what accelerate has placed, and send the
        # weights from the first process to all others, which have them.
        object.__setattr__(self, "backbone", decoder_backbone(model))
        if self.hparams["generate"] is not None:
            object.__setattr__(self, "_model", model)
            if self.continuation is None:
                self.continuation = self._continuation()

    def _continuation(self, **settings: Any) -> Continuation:
        assert self._model is not None
        generate = self.hparams["generate"] | settings
        return Continuation(self._model, generate, self.hparams["prefill_chunk_size"])

    def continuation_by(self, n_tokens: int) -> Continues:
        """A continuation that adds so many tokens to each text, whatever the model writes."""
        return self._continuation(max_new_tokens=n_tokens, min_new_tokens=n_tokens)

    def check_length(self, longest: int) -> None:
        """See that the model has positions for the longest text and what it may add to it.

        Args:
            longest: Tokens of the longest, with all that may be added.

        Raises:
            UserError: It has not.
        """
        if not self.max_new_tokens:
            return
        if self._is_loaded:
            config = self.backbone.config
        else:
            with model_overlays(self.hparams["models_dir"]):
                config = load_config(self.source, self.hparams["config_overrides"])
        require_room(covered_positions(config), longest, self.max_new_tokens)

    @torch.inference_mode()
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add what the model writes to the texts of a batch, where it does.

        Args:
            batch: As ``predict_step`` takes it, with ``example_ids``.
            dataloader_idx: Not used.

        Returns:
            The batch, whose texts are longer, with ``n_prompt_tokens`` (B,) int64.

        Raises:
            UserError: The batch has no example ids, a text is too long, or does not fit into memory.
        """
        if self.continuation is None:
            return batch
        fields = batch_fields(batch)
        lengths = fields.sequence_lengths.tolist()
        longest = max(lengths) + self.max_new_tokens
        require_room(covered_positions(self.backbone.config), longest, self.max_new_tokens)
        texts = [row[:length] for row, length in zip(batch["input_ids"], lengths, strict=True)]
        with Ranks.of(self._trainer).reading_together():
            return batch_with(batch, self.continuation(texts, fields.example_ids.tolist()))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Run the backbone; an active sniffer captures what its attention sees.

        Texts that a model reads with frequencies of their length are read with those alone that have
        the same, those that it would read otherwise in company each by itself, and a batch that does
        not fit into the device's memory in halves.

        Args:
            batch: ``input_ids`` (B, S) int64, padded on the right, and ``sequence_lengths`` (B,) in
                tokens, for padding to be left out of a part of a batch; without them, those of
                ``attention_mask``, or S.
            batch_idx: Number of the batch.

        Returns:
            The number of tokens that were read, padding included.

        Raises:
            UserError: The sequences are longer than the model's learned positions, or one of them
                does not fit into the device's memory.
        """
        with Ranks.of(self._trainer).reading_together():
            self._read_batch(batch)
        return int(batch["input_ids"].numel())

    def _read_batch(self, batch: dict[str, Any]) -> None:
        size, width = batch["input_ids"].shape
        require_positions(self.backbone.config, width)
        if must_be_read_alone(self.backbone):
            self._read_parts(batch, [(number, number + 1) for number in range(size)])
        elif depends_on_length(self.backbone):
            spans = spans_of_like_frequencies(self.backbone, sequence_lengths(batch).tolist())
            self._read_parts(batch, spans)
        else:
            self._read_as_fits(batch, 0, size, width)

    def _read_parts(self, batch: dict[str, Any], spans: Sequence[tuple[int, int]]) -> None:
        """Read each span of a batch's sequences by itself, no wider than the longest of them."""
        sniffer, lengths = get_active_sniffer(), sequence_lengths(batch).tolist()
        for start, stop in spans:
            if isinstance(sniffer, Sniffer):
                sniffer.read_part(start, stop)
            self._read_as_fits(batch, start, stop, max(1, *lengths[start:stop]))

    def _read_as_fits(self, batch: dict[str, Any], start: int, stop: int, width: int) -> None:
        """Read the sequences of a batch from ``start`` on, up to ``stop`` and the token at ``width``.

        Where the device runs out of memory they are read in halves.
        """
        size = stop - start
        try:
            self._read(batch["input_ids"][start:stop, :width])
            return
        except torch.OutOfMemoryError as error:
            if self.tensor_parallel > 1:
                raise too_large_to_share(size, width) from error
            if size == 1:
                raise UserError(
                    f"data.tokenizer.max_length: a text of {width:,} tokens does not fit into the "
                    "device's memory; set model.prefill_chunk_size, to 4096 for example, lower "
                    "max_length, or spread the model with model.device_map: auto"
                ) from error
        # Here and not in the handler, where the error holds the tensors of the forward.
        self._warn_of_size(size, width)
        torch.cuda.empty_cache()
        middle = start + (size + 1) // 2
        self._read_parts(batch, [(start, middle), (middle, stop)])

    def _warn_of_size(self, size: int, width: int) -> None:
        """Say what did not fit, where nothing as small was said before."""
        if size * width < self._too_large:
            self._too_large = size * width
            log.warning(
                "a batch of %d x %s tokens did not fit into the device's memory and is read in halves; "
                "set data.max_tokens_per_batch below %s, or a smaller data.batch_size, to save the "
                "attempt",
                size,
                f"{width:,}",
                f"{size * width:,}",
            )

    def _read(self, input_ids: Tensor) -> None:
        with capture_attention(self.backbone):
            prefill_chunk_size = self.hparams["prefill_chunk_size"]
            if prefill_chunk_size is None:
                with frequencies_for(self.backbone, input_ids.shape[1]):
                    self.backbone(input_ids=input_ids, use_cache=False)
            else:
                for _ in read_in_passages(self.backbone, input_ids, prefill_chunk_size):
                    pass


def require_positions(config: PreTrainedConfig, length: int) -> None:
    """See that a model has positions for so many tokens.

    Args:
        config: The config of its decoder.
        length: Tokens in the longest sequence.

    Raises:
        UserError: It has learned fewer.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit and not getattr(config, "rope_parameters", None):
        raise UserError(
            f"data.tokenizer.max_length: a sequence has {length} tokens and the model "
            f"has {limit} learned positions; set max_length to {limit} or less"
        )
