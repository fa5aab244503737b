"""``qk-sniffer estimate``: the config of ``predict``, read as predict reads it, and nothing run."""

import time
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch

from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import Selection
from qk_sniffer.errors import UserError
from qk_sniffer.estimate.capture import Capture
from qk_sniffer.estimate.shares import largest_share
from qk_sniffer.estimate.table import Timing, table
from qk_sniffer.estimate.texts import count_texts
from qk_sniffer.estimate.timing import read_samples, seconds_a_token
from qk_sniffer.models import (
    adapter_bytes,
    attention_geometry,
    decoder_backbone,
    quantization_of,
    require_known_tokens,
)
from qk_sniffer.module import SnifferModule, require_positions
from qk_sniffer.predict import PredictCLI, start
from qk_sniffer.recording import require_listed


class EstimateCLI(PredictCLI):
    """The parts of a prediction, made and not run."""

    more_options = ("time",)
    lacks_device: UserError | None = None
    """Why the trainer is one of the CPU instead; None where it is the config's own."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer; where this host has no such device, one of as many processes on the CPU."""
        try:
            return super().instantiate_trainer(**kwargs)
        except UserError as error:
            n_devices = _count_devices(self._get(self.config_init, "trainer")["devices"])
            trainer = super().instantiate_trainer(accelerator="cpu", devices=n_devices, **kwargs)
            self.lacks_device = error
            return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Predict is not run."""

    @property
    def sniffer(self) -> SnifferCallback:
        """The callback; the trainer is never started, so it does not begin."""
        sniffer: SnifferCallback = self._get(self.config_init, "sniffer")
        return sniffer


def _count_devices(devices: Any) -> Any:
    """Devices of a setting that a host without them can't resolve; one where it names no number."""
    if devices in ("auto", -1, "-1"):
        return 1
    return len(devices) if isinstance(devices, list) else devices


def estimate(args: list[str], *, timed: bool) -> str:
    """What ``qk-sniffer predict`` would take with the same arguments, as a table.

    The data root and the Hub's dataset are neither read nor written, and no weights are loaded unless
    ``timed``. Texts are tokenized, into the cache where the run finds them.

    Args:
        args: Arguments of ``predict``.
        timed: Load the model, and read some tokens of the run to tell its time.

    Raises:
        UserError: As ``predict`` does, for what is wrong in config, model or data.
    """
    cli = start(EstimateCLI, args)
    module, data, trainer, sniffer = cli.model, cli.datamodule, cli.trainer, cli.sniffer
    if timed and module.tensor_parallel > 1:
        raise UserError(
            "model.tensor_parallel: --time reads with a model that one process has for itself; leave "
            "--time out, or set it to 1"
        )
    if timed and cli.lacks_device is not None:
        raise cli.lacks_device
    module.check_trainer(trainer)
    require_listed(sniffer.capture.sampler, data)
    skeleton = module.skeleton()
    backbone = decoder_backbone(skeleton)
    geometry = None if timed else attention_geometry(backbone)
    # What a data module asks of a trainer; the real one would have the callback take the data root.
    model = SimpleNamespace(
        source=module.source, backbone=backbone, max_new_tokens=module.max_new_tokens
    )
    data.trainer = SimpleNamespace(lightning_module=model, world_size=1, callbacks=[])
    data.setup("predict")
    texts = count_texts(data)
    smallest, largest = data.token_range() or texts.largest["input_ids"].aminmax()
    require_known_tokens(int(smallest), int(largest), backbone)
    require_positions(backbone.config, int(texts.lengths.max()))
    module.check_length(int(texts.lengths.max()))
    seconds_to_load = 0.0
    if geometry is None:
        device = trainer.strategy.root_device
        seconds_to_load = _load(module, device)
        geometry = attention_geometry(module.backbone)
    settings = sniffer.capture
    selection = Selection.of(settings.as_settings())
    n_shards = module.tensor_parallel
    n_readers = trainer.world_size // n_shards
    capture = Capture(settings, geometry, texts, selection, sniffer.moments, n_readers, n_shards)
    timing = None
    if timed:
        samples = read_samples(module, capture, device, data.tokenizer)
        step = seconds_a_token(module, capture, device) if module.max_new_tokens else None
        timing = Timing(seconds_to_load, samples, trainer.world_size, str(device), step)
    return table(
        data,
        skeleton,
        capture,
        largest_share(module, skeleton, geometry.layers),
        sniffer.data_root,
        timing,
        quantization_of(module.source, skeleton),
        adapter_bytes(module.source),
        module.hparams["prefill_chunk_size"],
    )


def _load(module: SnifferModule, device: torch.device) -> float:
    """Load the weights as a run does; gives the seconds that it took."""
    started = time.perf_counter()
    module.to(device)
    module.configure_model()
    return time.perf_counter() - started
