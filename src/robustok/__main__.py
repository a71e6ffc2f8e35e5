"""Lets ``python -m robustok``, ``torchrun -m robustok`` and ``accelerate launch -m robustok`` be the command."""

import sys

from robustok.cli import main

sys.exit(main())
