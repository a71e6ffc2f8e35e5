"""The contracts of tokenizers and generators, held against every family there is."""

from itertools import product

import pytest
import torch

from robustok.generators import GENERATORS, default_sampling
from robustok.randomness import image_rngs
from robustok.tokenizers import TOKENIZERS, encoder_digest, frozen_weights
from robustok.types import DiscreteTokenizer, Generator, Tokenizer
from tiny_models import CLASSES, LATENT_SHAPE, TINY_GENERATORS, TINY_TOKENIZERS, tiny_generator, tiny_tokenizer

LABELS = torch.tensor([0, 4, CLASSES])


def test_every_family_is_here():
    """A new family gets a line in tiny_models.py, and with it these tests."""
    assert TINY_TOKENIZERS.keys() == TOKENIZERS.keys()
    assert TINY_GENERATORS.keys() == GENERATORS.keys()


GRIDS = ({"name": "fsq", "levels": [2] * 4}, {"name": "lfq", "bits": 4})  # quantisers without a learned codebook


@pytest.fixture(params=[*TINY_TOKENIZERS, *product(("robustok", "llamagen"), GRIDS)], ids=str)
def tokenizer(request):
    name, quantizer = (request.param, None) if isinstance(request.param, str) else request.param
    return tiny_tokenizer(name, **({} if quantizer is None else {"quantizer": quantizer}))


@pytest.fixture(params=TINY_GENERATORS)
def generator(request):
    return tiny_generator(request.param)


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents_for(generator, count=3):
    rng = torch.Generator().manual_seed(1)
    if getattr(generator, "kind", "discrete") == "continuous":
        return torch.randn(count, *LATENT_SHAPE, generator=rng)
    return torch.randint(generator.codebook_size, (count, LATENT_SHAPE[0]), generator=rng)


def sampling_for(generator, scale=3.0):
    settings = {"guidance_scale": scale} | ({"steps": 4} if getattr(generator, "kind", "") == "continuous" else {})
    return default_sampling(generator.config.name).model_copy(update=settings)


# Tokenizers


def test_a_tokenizer_encodes_and_decodes(tokenizer):
    length, width = tokenizer.latent_shape
    assert isinstance(tokenizer, DiscreteTokenizer if tokenizer.kind == "discrete" else Tokenizer)
    assert (tokenizer.image_size, tokenizer.latent_shape) == (8, LATENT_SHAPE)
    latents = tokenizer.encode(images())
    if tokenizer.kind == "discrete":
        assert (latents.shape, latents.dtype) == ((3, length), torch.int64)
        assert latents.min() >= 0
        assert latents.max() < len(tokenizer.codebook)
        assert tokenizer.codebook.shape == (16, width)
        assert tokenizer.embed(latents).shape == (3, length, width)
        assert tokenizer.embed(latents).dtype == torch.float32
    else:
        assert (latents.shape, latents.dtype) == ((3, length, width), torch.float32)
    decoded = tokenizer.decode(latents)
    assert (decoded.shape, decoded.dtype) == ((3, 3, 8, 8), torch.float32)
    assert decoded.isfinite().all()
    assert decoded.std() > 0


def test_latents_and_images_do_not_depend_on_the_batch(tokenizer):
    latents = tokenizer.encode(images())
    alone = torch.cat([tokenizer.encode(image[None]) for image in images()])
    torch.testing.assert_close(alone, latents, atol=1e-5, rtol=1e-5)
    decoded = torch.cat([tokenizer.decode(latent[None]) for latent in latents])
    torch.testing.assert_close(decoded, tokenizer.decode(latents), atol=1e-4, rtol=1e-4)


def test_post_training_moves_the_decoder_and_nothing_else(tokenizer):
    latents, before = tokenizer.encode(images()), encoder_digest(tokenizer)
    decoded = tokenizer.decode(latents)
    trained = [p.requires_grad_() for module in tokenizer.decoder_modules() for p in module.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    (tokenizer.train().decode(latents) - images()).square().mean().backward()
    assert all(p.grad is not None for p in trained)  # distributed training refuses parameters that nothing uses
    assert not any(p.grad is not None for p in frozen_weights(tokenizer).values())
    optimizer.step()
    tokenizer.eval()
    assert encoder_digest(tokenizer) == before
    assert torch.equal(tokenizer.encode(images()), latents)
    assert not torch.equal(tokenizer.decode(latents), decoded)
    with torch.no_grad():
        next(iter(frozen_weights(tokenizer).values())).add_(1)
    assert encoder_digest(tokenizer) != before


def test_a_tokenizer_says_what_it_is_and_that_it_is_well(tokenizer):
    assert isinstance(tokenizer.licence, str)
    assert tokenizer.licence
    assert tokenizer.image_range in ((-1.0, 1.0), (0.0, 1.0))
    assert not hasattr(tokenizer, "check") or tokenizer.check() == []


@pytest.mark.parametrize("name", [name for name in TINY_TOKENIZERS if hasattr(TOKENIZERS[name][0], "check")])
def test_a_check_speaks_in_sentences(name):
    """Of weights that are no numbers, or of statistics that were not set."""
    tokenizer = tiny_tokenizer(name, **({"latent_mean": 0.0, "latent_std": 1.0} if name == "maetok" else {}))
    if name != "maetok":
        for parameter in tokenizer.parameters():
            parameter.data.fill_(float("nan"))
    found = tokenizer.check(images())
    assert found
    for sentence in found:
        assert sentence[0].isupper()
        assert sentence.endswith(".")


# Generators


def test_a_generator_samples_latents(generator):
    assert isinstance(generator, Generator)
    samples = generator.generate(LABELS, sampling_for(generator), image_rngs(0, range(3)))
    reference = latents_for(generator)
    assert (samples.shape, samples.dtype) == (reference.shape, reference.dtype)
    assert samples.isfinite().all()
    if not samples.is_floating_point():
        assert samples.min() >= 0
        assert samples.max() < generator.codebook_size
    others = generator.generate(LABELS, sampling_for(generator), image_rngs(1, range(3)))
    assert not torch.equal(samples, others)


def test_samples_do_not_depend_on_the_batch(generator):
    settings, reference = sampling_for(generator), latents_for(generator)
    for mixture in ({}, {"reference": reference, "sigma": 0.5}):
        together = generator.generate(LABELS, settings, image_rngs(0, range(3)), **mixture)
        for i in range(3):
            own = {key: value[i : i + 1] if key == "reference" else value for key, value in mixture.items()}
            alone = generator.generate(LABELS[i : i + 1], settings, image_rngs(0, [i]), **own)
            torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)


def test_sigma_one_is_the_reference_and_sigma_zero_a_free_sample(generator):
    reference, settings = latents_for(generator), sampling_for(generator)

    def mixture(sigma):
        return generator.generate(LABELS, settings, image_rngs(0, range(3)), reference, sigma)

    assert torch.equal(mixture(1.0), reference)
    assert mixture(1.0).data_ptr() != reference.data_ptr()
    free = generator.generate(LABELS, settings, image_rngs(0, range(3)))
    assert torch.equal(mixture(0.0), free)
    distances = [(mixture(sigma).double() - reference).abs().mean() for sigma in (0.0, 0.5, 1.0)]
    assert distances[0] > distances[1] > distances[2] == 0


def test_a_generator_trains(generator):
    """The gradient reaches every parameter, and the condition matters."""
    latents, continuous = latents_for(generator), getattr(generator, "kind", "discrete") == "continuous"
    generator.requires_grad_().train()
    noise = (torch.tensor([0.2, 0.5, 0.9]), torch.randn(latents.shape)) if continuous else ()
    output = generator(latents, LABELS, *noise)
    assert output.targets.shape == latents.shape
    assert output.prediction.shape == (latents.shape if continuous else (*latents.shape, generator.codebook_size))
    output.prediction.square().mean().backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None] == []
    generator.eval()
    times = (torch.tensor([0.5] * 3),) if continuous else ()
    ask = getattr(generator, "velocity" if continuous else "logits", None) or generator.predict
    given = ask(latents, *times, LABELS)
    assert not torch.allclose(given[0], ask(latents, *times, LABELS.flip(0))[0], atol=1e-3)
    assert torch.equal(given[1], ask(latents, *times, LABELS.flip(0))[1])  # whose class stayed


def test_a_generator_says_what_it_is(generator):
    assert isinstance(generator.licence, str)
    assert (generator.null_label, generator.classes) == (CLASSES, CLASSES)
    assert tuple(generator.latent_shape) == LATENT_SHAPE
    if hasattr(generator, "check"):
        generator.sampling = sampling_for(generator)
        assert generator.check() == []
