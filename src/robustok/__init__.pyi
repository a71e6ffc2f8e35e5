"""The types of the public names, which ``__init__.py`` imports when they are first used."""

from robustok.commands.convert import ConvertRun, convert
from robustok.commands.convert_latents import ConvertLatentsRun, convert_latents
from robustok.commands.encode import EncodeRun, encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_delta import MakeDeltaRun, make_delta
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.commands.post_train import post_train
from robustok.commands.post_train_settings import PostTrainRun
from robustok.config import load as load_config
from robustok.data.dataset import open_images
from robustok.data.pixels import from_pixels, to_pixels
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.generators import load_generator
from robustok.generators.sampling import Sampling
from robustok.metrics.frechet import frechet_distance
from robustok.pretrained.export import export_folder, export_weights
from robustok.pretrained.load import load_pretrained
from robustok.pretrained.pipelines import load_pipeline
from robustok.randomness import image_rngs
from robustok.report import write_report
from robustok.tokenizers import load_tokenizer
from robustok.tokenizers.deltas import apply_delta, compute_delta
from robustok.tokenizers.perturbation import nearest_codes, perturb
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer

__all__ = [
    "ConvertLatentsRun",
    "ConvertRun",
    "EncodeRun",
    "EvaluateRun",
    "GenerateRun",
    "GeneratorTrainingRun",
    "MakeDeltaRun",
    "MakePairsRun",
    "PostTrainRun",
    "Sampling",
    "TokenizerTrainingRun",
    "UserError",
    "__version__",
    "apply_delta",
    "compute_delta",
    "convert",
    "convert_latents",
    "encode",
    "evaluate",
    "export_folder",
    "export_weights",
    "frechet_distance",
    "from_pixels",
    "generate",
    "image_rngs",
    "load_config",
    "load_generator",
    "load_pipeline",
    "load_pretrained",
    "load_tokenizer",
    "make_delta",
    "make_pairs",
    "nearest_codes",
    "open_images",
    "perturb",
    "post_train",
    "to_pixels",
    "train_generator",
    "train_tokenizer",
    "write_report",
]

__version__: str
