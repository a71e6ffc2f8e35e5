"""Compare the library with reference outputs of tiny models with random weights.

    python tests/golden/check.py FOLDER
    pytest --golden=FOLDER

The reference outputs are not part of this repository. FOLDER holds ``.safetensors`` files, some with a ``.json`` file
of the same name; sizes, configurations and sampling settings are read from the metadata and from there. The table has
one row per output: file, name, largest difference (for exact comparisons: the number of entries that differ),
tolerance, the share of the tolerance that is used, and OK or FAIL. Outputs that the library computes differently on
purpose, or not at all, are "not ours", with the reason. The exit code is 1 if a comparison fails, or if a file holds
an output that no check reads.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import method
import models
from table import QUANTITY, Golden, Row

import losses

CHECKS = {  # by the start of the file's name; the longest one that matches is used
    "dino_discriminator": losses.dino_discriminator,
    "gigatok_gpt": models.gigatok_gpt,
    "gigatok_tokenizer": models.gigatok_tokenizer,
    "lightningdit": models.lightningdit,
    "llamagen_gpt": models.llamagen_gpt,
    "llamagen_tokenizer": models.llamagen_tokenizer,
    "losses": losses.losses,
    "maetok_tokenizer": models.maetok_tokenizer,
    "maskgit_vqgan": models.maskgit_vqgan,
    "perturbation": method.perturbation,
    "rar_generator": models.rar_generator,
    "rar_generator_grad": models.rar_generator_grad,
    "robustok_tokenizer": models.robustok_tokenizer,
    "robustok_tokenizer_train": method.robustok_tokenizer_train,
    "sit": models.sit,
    "vavae": models.vavae,
}


def check(path: Path) -> list[Row]:
    """All rows of a file."""
    golden = Golden.open(path)
    fits = [prefix for prefix in CHECKS if path.stem.startswith(prefix)]
    if not fits:
        golden.fail("the whole file", f"no check for this name; known: {', '.join(CHECKS)}")
        return golden.rows
    try:
        CHECKS[max(fits, key=len)](golden)
    except Exception as error:  # the other files are still checked
        reason = " ".join(str(error).split())[:200]
        golden.fail("the rest of the file", f"{type(error).__name__}: {reason}")
    for name in golden.unread():
        golden.fail(name, "no check reads this")
    return golden.rows


def main(folder: Path) -> bool:
    """Print the table and its summary; return True if nothing failed."""
    torch.manual_seed(0)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} holds no .safetensors files")
    print(f"{'file':<24}  {'quantity':<{QUANTITY}}  {'difference':>10}  {'tolerance':<17} {'share':>8}")
    rows = []
    for file in files:
        rows += (found := check(file))
        print(*found, sep="\n", flush=True)
    compared = [row for row in rows if not row.reason]
    worst = max(compared, key=lambda row: row.share if row.share == row.share else float("inf"), default=None)
    counts = {status: sum(row.status == status for row in rows) for status in ("OK", "FAIL", "not ours")}
    print(f"\n{len(files)} files, {len(rows)} outputs: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    if worst is not None:
        print(f"largest share of a tolerance: {worst.share:.4f} ({worst.file} {worst.quantity})")
    return not counts["FAIL"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/golden/check.py FOLDER")
    raise SystemExit(0 if main(Path(sys.argv[1])) else 1)
