import pytest
import yaml

import tiny
from robustok.commands.encode import encode
from robustok.commands.evaluate import evaluate
from robustok.config import load
from robustok.evaluation.settings import EvaluateRun
from robustok.losses.discriminators import PatchConfig, ResNetConfig
from robustok.losses.guides import guide_names
from robustok.losses.reconstruction import ReconstructionConfig
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.training.decoder import train_decoder
from robustok.training.tokenizer import train_tokenizer
from tiny_models import save_resnet20


def name_of(**settings):
    return load_extractor(ExtractorConfig(**settings)).name


def test_names_are_those_of_results(tmp_path, classifier):
    resnet = save_resnet20(tmp_path / "resnet20.safetensors")
    small, public = name_of(path=classifier), name_of(name="cifar-resnet", path=resnet)
    guided = ReconstructionConfig(perceptual="classifier", perceptual_weights=str(classifier))
    plain, heads = ReconstructionConfig(perceptual="none"), ResNetConfig(weights=resnet)
    assert guide_names(plain, None) == guide_names(plain, PatchConfig()) == []
    assert guide_names(guided, PatchConfig()) == [small]
    assert guide_names(guided, heads) == sorted([small, public])
    assert guide_names(guided.model_copy(update={"perceptual_weight": 0.0}), heads) == [public]
    assert guide_names(ReconstructionConfig(perceptual="lpips"), None, [ExtractorConfig(path=classifier)]) == [small]


@pytest.mark.parametrize("how", ["perceptual", "teacher"])
def test_evaluate_says_which_space_guided_a_decoder(tmp_path, tokenizer, classifier, capsys, how):
    """Main training writes it into the snapshot; post-training without a guide keeps what the original had."""
    words = {
        "perceptual": ("reconstruction.perceptual=classifier", f"reconstruction.perceptual_weights={classifier}"),
        "teacher": ("teacher.name=classifier", f"teacher.path={classifier}"),
    }
    guided = train_tokenizer(tiny.main_run(tmp_path / "tokenizer", "steps=1", *words[how]))
    latents = encode(tiny.tokens_run(tmp_path / "latents", guided))
    post = train_decoder(tiny.post_run(tmp_path / "post", guided, latents, "steps=1"))
    name = name_of(path=classifier)
    for path in (guided, post):
        assert yaml.safe_load((path / "config.yaml").read_text())["guides"] == [name]
        assert f"- guides: ['{name}']" in (path / "README.md").read_text()
    capsys.readouterr()
    for path, said in {post: 1, tokenizer: 0}.items():
        given = (f"tokenizer={path}", f"extractor.path={classifier}", "metrics=[rfid]")
        evaluate(load(EvaluateRun, None, (f"out={tmp_path}/out", *tiny.DATA, *given)))
        noted = capsys.readouterr().err
        assert noted.count(f"was trained on the features of {name}, so distances measured in them flatter") == said


def test_post_training_adds_its_own_guide(tmp_path, tokenizer, pairs, classifier):
    words = ("steps=1", "reconstruction.perceptual=classifier", f"reconstruction.perceptual_weights={classifier}")
    post = train_decoder(tiny.post_run(tmp_path / "post", tokenizer, pairs, *words))
    assert yaml.safe_load((post / "config.yaml").read_text())["guides"] == [name_of(path=classifier)]
