"""The command ``predict``: LightningCLI restricted to prediction."""

from qk_sniffer.predict.command import PredictCLI, predict, quiet_lightning, start

__all__ = ["PredictCLI", "predict", "quiet_lightning", "start"]
