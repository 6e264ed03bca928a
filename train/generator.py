"""`hyperlora train` for launchers that start a script: deepspeed train/generator.py RECIPE -o RUN --deepspeed JSON."""

import sys

from hyperlora.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
