"""`python train.py`: the quickstart; `python train.py --help`: everything else."""

import sys

from lottery_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
