"""``python -m qk_sniffer``, the same as the command ``qk-sniffer``."""

import sys

from qk_sniffer.cli import main

if __name__ == "__main__":
    sys.exit(main())
