"""`python -m gptoss_export.exporter` is `gptoss-export`."""

import sys

from gptoss_export.exporter.cli import main

if __name__ == "__main__":
    sys.exit(main())
