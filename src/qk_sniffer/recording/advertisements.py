"""What Lightning prints of its other products, and warns of in its own code."""

import logging
import warnings

_LOGGER = logging.getLogger("lightning.pytorch.utilities.rank_zero")


def leave_out_advertisements() -> None:
    """Let Lightning report its devices, but not its tips and what is deprecated inside it."""
    _LOGGER.addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    # It runs SnifferModule's, as it is meant to.
    warnings.filterwarnings("ignore", message="You have overridden `on_after_batch_transfer`")
    warnings.filterwarnings("ignore", message=".*tensorboardX.* has been removed", module="lightning")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
