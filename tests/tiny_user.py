"""A user without rights, for tests that may run as root."""

import subprocess
import sys
from pathlib import Path


def as_nobody(imports: str, code: str, folder: Path) -> str:
    """What Python writes to stderr as a user who has no rights in a folder, but may pass its parents."""
    for parent in list(folder.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    lines = ("import os, sys", imports, "os.getuid() or os.setuid(65534)", code)
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False).stderr
