"""Whatever is wrong with words and inputs, no command leaves a trace, hangs, or writes elsewhere.

And whenever a command is killed, the same command can follow.
"""

import subprocess
import sys
from pathlib import Path


def test_hostile_tries(request):
    """``pytest tests/hostile --hostile=10000 --hostile-seed=1`` runs more, or others, than ``make test`` does."""
    tries, seed = (str(request.config.getoption(name)) for name in ("--hostile", "--hostile-seed"))
    script = Path(__file__).with_name("run.py")
    found = subprocess.run(
        [sys.executable, script, "--tries", tries, "--seed", seed],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout + found.stderr
