"""``qk-sniffer predict``: LightningCLI restricted to prediction, with the callback built in."""

import logging
import re
import sys
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qk_sniffer.callback import SnifferCallback
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError
from qk_sniffer.module import SnifferModule

_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


class PredictCLI(LightningCLI):
    """The sections model, data, sniffer and trainer of one YAML file, run as a prediction."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only predict, without the arguments that the sections give."""
        return {
            "predict": {
                "model",
                "dataloaders",
                "datamodule",
                "return_predictions",
                "ckpt_path",
                "weights_only",
            }
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the callback a section of its own."""
        parser.add_lightning_class_args(SnifferCallback, "sniffer")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, with a tqdm bar where bars are on and no second SnifferCallback."""
        config = self._get(self.config_init, "trainer")
        callbacks = config["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if any(isinstance(callback, SnifferCallback) for callback in callbacks):
            raise UserError(
                "trainer.callbacks: SnifferCallback is set by the sniffer section already; remove it"
            )
        if config["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks = [*callbacks, TQDMProgressBar()]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def before_predict(self) -> None:
        """Check the data root before anything is loaded, and keep the resolved config for it."""
        sniffer: SnifferCallback = self._get(self.config_init, "sniffer")
        sniffer.check_output()
        resolved = self._parser("predict").dump(self.config["predict"], skip_none=False)
        sniffer.config_yaml = _HUB_TOKEN.sub("<token>", resolved)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # The trainer's default accumulates every prediction in memory.
        return super()._prepare_subcommand_kwargs(subcommand) | {"return_predictions": False}


def predict(args: list[str]) -> None:
    """Run ``qk-sniffer predict`` with the arguments behind it.

    Raises:
        UserError: The config or the command line is wrong.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Lightning's report of its devices and its tips would bury the run's own lines.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # LightningCLI reads sys.argv, and so do the processes that a strategy launches.
    sys.argv[1:] = [
        "predict",
        *("--print_config=comments" if arg == "--print_config" else arg for arg in args),
    ]
    try:
        PredictCLI(
            SnifferModule,
            TextDataModule,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            trainer_defaults={"logger": False, "enable_checkpointing": False},
            parser_kwargs={"exit_on_error": False, "predict": {"exit_on_error": False}},
        )
    except ArgumentError as error:
        raise UserError(str(error)) from error
