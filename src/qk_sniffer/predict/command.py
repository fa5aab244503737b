"""``qk-sniffer predict``: LightningCLI restricted to prediction, with the callback built in."""

import dataclasses
import logging
import sys
import typing
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import HELP, bases_first, explain
from qk_sniffer.data import TextDataModule
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.module import SnifferModule
from qk_sniffer.recording import leave_out_advertisements, settings

_PARSER_OPTIONS = {"exit_on_error": False, "allow_abbrev": False}


class PredictCLI(LightningCLI):
    """The sections model, data, sniffer and trainer of one YAML file, run as a prediction."""

    more_options: ClassVar[tuple[str, ...]] = ()
    """Options of the command that are no fields of the config."""

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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse config and command line; a mistake is one line."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            fields = (*_fields(self._parser("predict")), *self.more_options)
            raise UserError(explain(str(error), fields)) from error

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
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"trainer: {first_line(error)}; {HELP}") from error
        _require_all_processes(trainer)
        return trainer

    def before_predict(self) -> None:
        """Check data root and model before data is loaded, and keep the resolved config."""
        sniffer: SnifferCallback = self._get(self.config_init, "sniffer")
        trainer = self.trainer
        if trainer.global_rank == 0:
            sniffer.own_data_root.take(n_nodes=trainer.num_nodes)
        module: SnifferModule = self._get(self.config_init, "model")
        try:
            module.check_model()
            module.check_trainer(trainer)
            sniffer.own_data_root.earlier_run(
                settings(module, self.datamodule, sniffer.capture, sniffer.moments)
            )
        except BaseException:
            sniffer.own_data_root.ownership.release()
            raise
        config = self.config["predict"]
        sniffer.own_data_root.config_yaml = self._parser("predict").dump(config, skip_none=False)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # The trainer's default accumulates every prediction in memory.
        return super()._prepare_subcommand_kwargs(subcommand) | {"return_predictions": False}


CLI = TypeVar("CLI", bound=PredictCLI)


def predict(args: list[str]) -> None:
    """Run ``qk-sniffer predict`` with the arguments behind it.

    Raises:
        UserError: The config or the command line is wrong.
    """
    start(PredictCLI, args)


def start(cli: type[CLI], args: list[str]) -> CLI:
    """Make the parts that the arguments of ``qk-sniffer predict`` describe, and let ``cli`` run them.

    Raises:
        UserError: The config or the command line is wrong.
    """
    # Comments of fields come from the sources, which take seconds to read.
    has_comments = any(arg.startswith("--print_config") for arg in args)
    set_parsing_settings(docstring_parse_attribute_docstrings=has_comments)
    quiet_lightning()
    # LightningCLI reads sys.argv, and so do the processes that a strategy launches.
    sys.argv[1:] = [
        "predict",
        *("--print_config=comments" if arg == "--print_config" else arg for arg in bases_first(args)),
    ]
    return cli(
        SnifferModule,
        TextDataModule,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        trainer_defaults={"logger": False, "enable_checkpointing": False},
        parser_kwargs={**_PARSER_OPTIONS, "predict": _PARSER_OPTIONS},
    )


def _fields(parser: LightningArgumentParser) -> list[str]:
    """Every field that a config may have, such as data.path, and the options beside them."""
    fields = [
        option.removeprefix("--")
        for option in parser._option_string_actions
        if option.startswith("--") and not option.endswith("+")
    ]
    # A section that may be null is one option, and has its fields all the same.
    for action in parser._actions:
        for kind in typing.get_args(getattr(action, "_typehint", None)):
            if dataclasses.is_dataclass(kind):
                fields += [f"{action.dest}.{field.name}" for field in dataclasses.fields(kind)]
    return fields


def _require_all_processes(trainer: pl.Trainer) -> None:
    """See that the trainer counts on every process that a launcher has started.

    Otherwise each of them would take itself for the only one.
    """
    for name, launched in (("torchrun", TorchElasticEnvironment), ("srun", SLURMEnvironment)):
        if launched.detect() and (size := launched().world_size()) != trainer.world_size:
            raise UserError(
                f"trainer.devices: {name} has started {size} processes, and the trainer counts on "
                f"{trainer.world_size}; set trainer.devices to the processes on each node, and "
                "trainer.num_nodes to the nodes"
            )


def quiet_lightning() -> None:
    """Leave out Lightning's report of its devices and its tips, which bury the run's own lines."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    leave_out_advertisements()
