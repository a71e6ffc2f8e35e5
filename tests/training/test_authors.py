"""``trainable=authors``: what is trained, on which inputs and with which losses."""

import pytest
import torch
import yaml

import tiny
from robustok.commands.make_pairs import make_pairs, reencode
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from robustok.training.authors import AuthorsStep
from robustok.training.decoder import train_decoder
from robustok.training.tokenizer import train_tokenizer

AUTHORS = ("trainable=authors", "steps=3", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def by_authors(tmp_path_factory, tokenizer, pairs, classifier):
    """Run folder of the authors' procedure; the tokenizer was trained without a teacher, so there is none here."""
    out = tmp_path_factory.mktemp("authors") / "run"
    train_decoder(tiny.post_run(out, tokenizer, pairs, *AUTHORS, *tiny.ADVERSARY[:2]))
    return out


def changed(before, after):
    """Names of parameters that moved."""
    weights = dict(after.named_parameters())
    return {name for name, p in before.named_parameters() if not torch.equal(weights[name], p)}


def test_all_is_trained_but_the_transformer_of_the_encoder(tokenizer, by_authors):
    before, after = load_tokenizer(tokenizer), load_tokenizer(by_authors)
    moved = changed(before, after)
    names = {name for name, _ in before.named_parameters()}
    assert names - moved == {name for name in names if name.startswith("encoder.backbone.")}
    assert moved & frozen_weights(before).keys() == {
        "encoder.latent_tokens",
        "encoder.level_embed.weight",
        "to_latent.weight",
        "to_latent.bias",
        "quantizer.embedding.weight",
    }


def test_the_papers_procedure_trains_the_decoder_alone(tmp_path, tokenizer, pairs):
    out = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *AUTHORS, "trainable=decoder"))
    before = load_tokenizer(tokenizer)
    assert not changed(before, load_tokenizer(out)) & frozen_weights(before).keys()


def test_terms_of_the_quantiser_are_trained(by_authors):
    for line in tiny.log(by_authors):
        assert line["codebook"] > 0
        assert line["total"] == pytest.approx(sum(line[n] for n in ("pixel", "adversarial", "codebook", "commitment")))


def test_the_teacher_gets_the_mixture(tmp_path, classifier, pairs, tokenizer):
    teacher = ("teacher.name=classifier", f"teacher.path={classifier}")
    run = tiny.post_run(tmp_path / "run", tokenizer, pairs, *AUTHORS, *teacher)
    untaught = load_tokenizer(tokenizer)
    untaught.config = untaught.config.model_copy(
        update={"teacher_width": 16}
    )  # the classifier's width, and the encoder's
    procedure = AuthorsStep(run, untaught, "direct")
    latents = LatentCache(pairs).read(slice(0, 4)).latents
    images, *_, features = procedure.inputs(latents)
    assert torch.equal(features, procedure.teacher(images))
    terms = procedure.terms(procedure.model(*procedure.inputs(latents)))
    assert terms.keys() == {"codebook", "commitment", "semantic"}
    terms["semantic"].backward()
    assert procedure.model.to_latent.weight.grad.abs().max() > 0
    assert procedure.model.encoder.backbone.blocks[0].mlp.fc1.weight.grad is None


def test_images_are_encoded_again(tokenizer, pairs, tmp_path):
    bare, original = load_tokenizer(tokenizer), load_tokenizer(tokenizer)
    procedure = AuthorsStep(tiny.post_run(tmp_path / "x", tokenizer, pairs, *AUTHORS), bare, "direct")
    latents = LatentCache(pairs).read(slice(0, 64)).latents
    images = procedure.inputs(latents)[0]
    assert torch.equal(to_pixels(images), to_pixels(original.decode(latents)))
    tokens = procedure.model.eval()(*procedure.inputs(latents)).tokens
    assert torch.equal(tokens, reencode(original, latents))
    assert not torch.equal(tokens, latents)
    with torch.no_grad():
        bare.quantizer.embedding.weight.neg_()
    assert torch.equal(procedure.inputs(latents)[0], images)  # by the tokenizer as it was


def test_stochastic_depth_stays_active_in_the_frozen_transformer(tmp_path, pairs):
    words = ("steps=1", "tokenizer.encoder.depth=2", "tokenizer.encoder.drop_path=0.5")
    bare = load_tokenizer(train_tokenizer(tiny.main_run(tmp_path / "main", *words)))
    procedure = AuthorsStep(tiny.post_run(tmp_path / "x", tmp_path / "main", pairs, *AUTHORS), bare, "direct")
    procedure.model.train()
    images = torch.randn(8, 3, 16, 16)
    found = [procedure.model(images).features for _ in range(2)]
    assert not torch.equal(*found)


def test_latents_of_the_tokenizer_it_came_from_are_decoded(tokenizer, by_authors, pairs):
    before, after = load_tokenizer(tokenizer), load_tokenizer(by_authors)
    assert encoder_digest(after) == encoder_digest(before) == LatentCache(pairs).manifest.tokenizer
    assert tensor_digest(frozen_weights(after)) != tensor_digest(frozen_weights(before))  # although its codebook moved
    header = yaml.safe_load((by_authors / "snapshot" / "00000003" / "config.yaml").read_text())
    assert header["post_trained"]["trainable"] == "authors"


def test_what_does_not_fit_is_refused(tmp_path, tokenizer, generator, latents, classifier, pairs):
    words = ("mode=reencoded", f"tokenizer={tokenizer}")
    again = make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, latents, *words))
    with pytest.raises(UserError, match="the pairs are reencoded; make pairs mode=direct"):
        train_decoder(tiny.post_run(tmp_path / "run", tokenizer, again, *AUTHORS))
    bare = load_tokenizer(tokenizer)
    bare.config = bare.config.model_copy(update={"teacher_width": 99})
    run = tiny.post_run(tmp_path / "x", tokenizer, pairs, "teacher.name=classifier", f"teacher.path={classifier}")
    with pytest.raises(UserError, match="the teacher has width 16, the tokenizer learned from 99"):
        AuthorsStep(run, bare, "direct")
    bare.__class__ = type("Other", (torch.nn.Module,), {})
    with pytest.raises(UserError, match="is for robustok"):
        AuthorsStep(run, bare, "direct")
    assert not (tmp_path / "run").exists()
