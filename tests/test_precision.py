"""One setting with three values: what each of them switches, and that bf16 rounds weights once."""

import pytest
import torch
from torch import nn

import tiny
from robustok.commands.encode import encode
from robustok.commands.evaluate import evaluate
from robustok.config import load
from robustok.data.latent_cache import LatentCache
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.precision import at_precision, autocast, cast_weights, exact_float32, use_precision
from robustok.tokenizers import quantizer
from robustok.tokenizers.perturbation import nearest_codes
from tiny_models import TINY_GENERATORS, TINY_TOKENIZERS, tiny_generator, tiny_tokenizer

CPU, B = torch.device("cpu"), torch.backends
SWITCHES = (B.cuda.matmul, B.cudnn.conv, B.cudnn.rnn, B.mkldnn.matmul, B.mkldnn.conv, B.mkldnn.rnn)


def switches():
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.fixture(autouse=True)
def _as_before():
    yield
    B.fp32_precision = "none"
    use_precision("float32")


def older():
    B.cudnn.allow_tf32 = True  # as PyTorch starts


def older_everywhere():
    torch.set_float32_matmul_precision("high")


def newer():
    B.fp32_precision = "tf32"


def newer_of_products():
    B.cuda.matmul.fp32_precision = "tf32"


WAYS = [older, older_everywhere, newer, newer_of_products]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["float32", "bf16", "tf32"])
def test_a_training_is_exact_or_tf32_throughout(way, precision):
    way()
    start_accelerator(precision=precision)
    assert switches() == ["tf32" if precision == "tf32" else "ieee"] * 6
    # What torch.compile and its guards read: it raises where the two ways contradict each other.
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    assert B.cudnn.allow_tf32 is (precision == "tf32")
    assert B.cuda.matmul.allow_tf32 is (precision == "tf32")


@pytest.mark.parametrize("way", WAYS)
def test_exact_float32_is_exact_and_leaves_everything_as_it_was(way):
    way()
    before = switches()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), exact_float32(CPU):
            assert switches() == ["ieee"] * 6
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
        assert switches() == before
    with pytest.raises(RuntimeError, match="broken"), exact_float32(CPU):
        raise RuntimeError("broken")
    assert switches() == before


def test_computations_have_their_precision_whatever_is_outside():
    x, layer = torch.randn(3, 4), nn.Linear(4, 4)
    use_precision("tf32")
    for precision, switch in (("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        with at_precision(CPU, precision):
            assert switches() == [switch] * 6
            assert (layer(x).dtype == torch.bfloat16) is (precision == "bf16")
    assert switches() == ["tf32"] * 6
    assert layer(x).dtype == torch.float32


def test_nearest_codes_are_searched_for_exactly(monkeypatch):
    """In TF32, and under the autocast of training, where the neighbours of a code would be searched for in bf16."""
    seen, product = [], torch.addmm

    def watched(*words, **settings):
        seen.append((switches(), (found := product(*words, **settings)).dtype))
        return found

    monkeypatch.setattr(torch, "addmm", watched)
    use_precision("tf32")
    with torch.autocast("cpu", torch.bfloat16):
        quantizer.nearest_code(torch.randn(5, 4), torch.randn(8, 4))
        nearest_codes(torch.randn(8, 4), strength=2)
    assert seen == [(["ieee"] * 6, torch.float32)] * 2


@pytest.mark.parametrize("name", TINY_TOKENIZERS)
@torch.no_grad()
def test_weights_of_a_tokenizer_rounded_once_change_nothing_under_autocast(name):
    model, rounded = tiny_tokenizer(name), cast_weights(tiny_tokenizer(name), "bf16")
    layers = [m for m in rounded.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert {m.weight.dtype for m in layers} == {torch.bfloat16}
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with at_precision(CPU, "bf16"):
        latents = model.encode(images)
        assert torch.equal(rounded.encode(images), latents)
        assert torch.equal(rounded.decode(latents), model.decode(latents))
    if model.kind == "discrete":
        assert rounded.codebook.dtype == torch.float32
    assert cast_weights(model, "tf32").state_dict().keys() == rounded.state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", TINY_GENERATORS)
def test_a_generator_with_rounded_weights_samples_the_same(name):
    labels = torch.arange(3)
    found = []
    for model in (tiny_generator(name), cast_weights(tiny_generator(name), "bf16")):
        with at_precision(CPU, "bf16"):
            rngs = [torch.Generator().manual_seed(i) for i in range(3)]
            found.append(model.generate(labels, model.sampling, rngs))
    assert found[0].dtype == found[1].dtype == (torch.int64 if model.kind == "discrete" else torch.float32)
    assert torch.equal(*found)


def test_training_and_inference_name_the_same_three_values():
    for words in (("out=x", "precision=auto"), ("out=x", "precision=fp8")):
        with pytest.raises(UserError, match=r"'float32', 'tf32' or 'bf16'"):
            tiny.main_run("x", *words[1:])
        with pytest.raises(UserError, match=r"'float32', 'tf32' or 'bf16'"):
            load(EvaluateRun, None, ("tokenizer=x", "data.name=digits", *words))
    assert autocast(CPU, "bf16").fast_dtype == torch.bfloat16


def test_caches_and_results_say_their_precision(tmp_path, tokenizer, classifier):
    for precision in ("float32", "tf32", "bf16"):
        cache = LatentCache(encode(tiny.tokens_run(tmp_path / precision, tokenizer, f"cache.precision={precision}")))
        assert cache.manifest.source["precision"] == precision
        words = (
            f"out={tmp_path}",
            *tiny.DATA,
            f"tokenizer={tokenizer}",
            "metrics=[psnr,rfid]",
            f"precision={precision}",
        )
        words = (*words, "extractor.name=classifier", f"extractor.path={classifier}")
        assert {line.details["precision"] for line in evaluate(load(EvaluateRun, None, words))} == {precision}
    with pytest.raises(UserError, match="precision: float32 -> bf16"):
        encode(tiny.tokens_run(tmp_path / "float32", tokenizer, "cache.precision=bf16"))
