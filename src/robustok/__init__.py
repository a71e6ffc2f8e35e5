"""Image tokenizers whose decoders expect what generators make: latent perturbation, pFID and post-training.

The public names are imported when they are first used, so that ``import robustok`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name: the module that defines it, and its name there where that is another.
_SOURCES = {
    "UserError": "robustok.errors",
    "load_config": "robustok.config:load",
    "load_tokenizer": "robustok.tokenizers",
    "load_generator": "robustok.generators",
    "load_pretrained": "robustok.pretrained.load",
    "load_pipeline": "robustok.pretrained.pipelines",
    "export_weights": "robustok.pretrained.export",
    "export_folder": "robustok.pretrained.export",
    "open_images": "robustok.data.dataset",
    "to_pixels": "robustok.data.pixels",
    "from_pixels": "robustok.data.pixels",
    "nearest_codes": "robustok.tokenizers.perturbation",
    "perturb": "robustok.tokenizers.perturbation",
    "compute_delta": "robustok.tokenizers.deltas",
    "apply_delta": "robustok.tokenizers.deltas",
    "Sampling": "robustok.generators.sampling",
    "image_rngs": "robustok.randomness",
    "frechet_distance": "robustok.metrics.frechet",
    # A function and its configuration for each command.
    "train_tokenizer": "robustok.training.tokenizer",
    "TokenizerTrainingRun": "robustok.training.tokenizer",
    "encode": "robustok.commands.encode",
    "EncodeRun": "robustok.commands.encode",
    "train_generator": "robustok.training.generator",
    "GeneratorTrainingRun": "robustok.training.generator",
    "generate": "robustok.commands.generate",
    "GenerateRun": "robustok.commands.generate",
    "make_pairs": "robustok.commands.make_pairs",
    "MakePairsRun": "robustok.commands.make_pairs",
    "post_train": "robustok.commands.post_train",
    "PostTrainRun": "robustok.commands.post_train_settings",
    "make_delta": "robustok.commands.make_delta",
    "MakeDeltaRun": "robustok.commands.make_delta",
    "evaluate": "robustok.commands.evaluate",
    "EvaluateRun": "robustok.evaluation.settings",
    "write_report": "robustok.report",
    "convert": "robustok.commands.convert",
    "ConvertRun": "robustok.commands.convert",
    "convert_latents": "robustok.commands.convert_latents",
    "ConvertLatentsRun": "robustok.commands.convert_latents",
}

__all__ = ["__version__", *_SOURCES]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'robustok' has no attribute {name!r}")
    module, _, inner = _SOURCES[name].partition(":")
    value = getattr(importlib.import_module(module), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
