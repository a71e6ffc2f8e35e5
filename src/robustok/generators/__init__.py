"""Generators: models of latents. One family a file; to add one, write the file and add a line to ``GENERATORS``."""

from pathlib import Path

from robustok.config import validate
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling
from robustok.snapshots import load_weights, read_snapshot
from robustok.types import Generator, UserError

GENERATORS = {"rar": (RAR, RARConfig)}
GeneratorConfig = RARConfig  # a union discriminated by ``name`` once there are two


def load_generator(path: str | Path) -> Generator:
    """Load a generator from a snapshot, or from the newest snapshot of a run folder; in eval mode, on the CPU.

    Its ``latent_space`` names the tokenizer whose latents it makes, its ``sampling`` the settings stored with it.

    Raises:
        UserError: no snapshot, another kind, an unknown family, or weights that do not fit.
    """
    snapshot = read_snapshot(path, kind="generator")
    header = snapshot.header
    if header["config"].get("name") not in GENERATORS:
        raise UserError(
            f"{path}: unknown generator family {header['config'].get('name')!r}; known: {', '.join(GENERATORS)}"
        )
    lacking = [key for key in ("codebook_size", "latent_shape", "classes", "latent_space") if key not in header]
    if lacking:
        raise UserError(f"{snapshot.path}/config.yaml lacks {', '.join(lacking)}; copy or train the generator again")
    family, config = GENERATORS[header["config"]["name"]]
    shape = tuple(header["latent_shape"])
    generator = family(
        validate(config, header["config"], source=str(path)), header["codebook_size"], shape[0], header["classes"]
    )
    load_weights(generator, snapshot)
    generator.latent_shape = shape
    generator.latent_space = header["latent_space"]
    generator.sampling = validate(Sampling, header.get("sampling", {}), source=str(path))
    return generator.eval().requires_grad_(False)
