import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.commands.make_pairs import make_pairs
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from robustok.training import decoder as post_training
from robustok.training.decoder import LatentDecoder, train_decoder
from robustok.training.decoder_losses import make_adversary
from robustok.training.objectives import real_images
from robustok.training.tokenizer import train_tokenizer

ADVERSARY = tiny.ADVERSARY[:2]  # the carried discriminator brings its own settings


@pytest.fixture(scope="module")
def post_trained(tmp_path_factory, tokenizer, pairs):
    """Run folder of post-training with the carried discriminator, which learns from the fourth step on."""
    out = tmp_path_factory.mktemp("post") / "run"
    train_decoder(tiny.post_run(out, tokenizer, pairs, *ADVERSARY, "adversarial.start=3", "snapshot_every=3"))
    return out


def weights(path, name="model"):
    return load_file(path / f"{name}.safetensors")


def test_only_the_decoder_changes(tokenizer, post_trained):
    before, after = load_tokenizer(tokenizer), load_tokenizer(post_trained)
    assert encoder_digest(before) == encoder_digest(after)
    for name, value in frozen_weights(before).items():
        assert torch.equal(frozen_weights(after)[name], value)
    decoder = {name for name, _ in before.named_parameters()} - frozen_weights(before).keys()
    assert {name.split(".")[0] for name in decoder} == {"from_latent", "decoder"}
    after_weights, unchanged = dict(after.named_parameters()), set()
    for name, value in before.named_parameters():
        if name in decoder and torch.equal(after_weights[name], value):
            unchanged.add(name)
    assert unchanged == set()

    images = open_images(Digits(limit=128), 16).read(range(64)).images
    tokens = before.encode(images)
    assert torch.equal(after.encode(images), tokens)
    assert len(tokens.unique()) > 8
    assert not torch.equal(after.decode(tokens), before.decode(tokens))


def test_training_states_keep_the_encoder_too(tokenizer, post_trained):
    before = frozen_weights(load_tokenizer(tokenizer))
    state = load_file(max((post_trained / "state").iterdir()) / "state.safetensors")
    for name, value in before.items():
        assert torch.equal(state[f"/tokenizer/{name}"], value)
        assert torch.equal(state[f"/average/{name}"], value)


def test_a_few_steps_lower_the_loss(tmp_path, tokenizer, generator, latents):
    pairs = make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, latents, "sigma=1"))
    words = ("steps=40", "log_every=10", "batch_size=32", "learning_rate=3e-3", "state_every=40")
    train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *words))
    lines = tiny.log(tmp_path / "run")
    assert lines[-1]["pixel"] < 0.98 * lines[0]["pixel"]


def test_the_logged_total_is_the_sum_of_the_logged_terms(post_trained):
    for line in tiny.log(post_trained):
        terms = [line[name] for name in ("pixel", "adversarial") if name in line]
        assert len(terms) == (2 if line["step"] > 3 else 1)
        assert line["total"] == pytest.approx(sum(terms), rel=1e-6)


def test_the_discriminator_is_carried_over(tokenizer, post_trained):
    carried = weights(tokenizer / "snapshot" / "00000060", "discriminator")
    early = weights(post_trained / "snapshot" / "00000003", "discriminator")
    late = weights(post_trained / "snapshot" / "00000006", "discriminator")
    assert all(torch.equal(early[name], value) for name, value in carried.items())  # its start is step 3
    assert not any(torch.equal(late[name], value) for name, value in carried.items())


def test_a_fresh_discriminator_is_a_function_of_the_seed(tmp_path, tokenizer, pairs):
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # what ran before in this process must not matter
        words = ("adversary=fresh", *tiny.ADVERSARY, "adversarial.start=100", "steps=1")
        path = train_decoder(tiny.post_run(tmp_path / str(noise), tokenizer, pairs, *words))
        found.append(weights(path, "discriminator"))
    carried = weights(tokenizer / "snapshot" / "00000060", "discriminator")
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert not torch.equal(found[0]["layers.6.weight"], carried["layers.6.weight"])


def test_nothing_to_carry_over(tmp_path, pairs):
    train_tokenizer(tiny.main_run(tmp_path / "bare", "steps=1"))
    with pytest.raises(UserError, match="was made by another tokenizer"):
        train_decoder(tiny.post_run(tmp_path / "run", tmp_path / "bare", pairs))
    with pytest.raises(
        UserError, match=r"holds no discriminator to carry over; set adversary=fresh, or adversarial\.weight=0"
    ):
        make_adversary(
            tiny.post_run(tmp_path / "run", tmp_path / "bare", pairs, *ADVERSARY, "adversary=carried"), accelerator=None
        )
    assert not (tmp_path / "run").exists()


def test_the_frozen_half_stays_in_evaluation_mode(tokenizer):
    model = LatentDecoder(load_tokenizer(tokenizer)).train()
    inside = model.tokenizer
    assert not any(module.training for module in (inside, inside.encoder, inside.quantizer))
    assert inside.decoder.training
    assert inside.from_latent.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"from_latent", "decoder"}


def test_the_targets_are_the_images_that_were_encoded(tokenizer, tmp_path, generator):
    from robustok.commands.encode import encode

    latents = encode(tiny.tokens_run(tmp_path / "flipped", tokenizer, "crops=center-flip"))
    cache = LatentCache(make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, latents, "sigma=1")))
    data, records = open_images(Digits(limit=128), 16), cache.read(slice(None))
    targets = data.to_batch(real_images(data, records)).images
    assert len(cache) == 256
    assert records.flips.sum() == 128
    assert torch.equal(load_tokenizer(tokenizer).encode(targets), records.latents)  # sigma 1: nothing but real tokens
    labels = torch.from_numpy(data.labels)
    assert torch.equal(labels[records.indices], records.labels)


def test_other_images_than_the_pairs_name_are_refused(tmp_path, tokenizer, pairs):
    with pytest.raises(UserError, match="pairs latents with other images"):
        train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, "data.limit=127"))
    assert not (tmp_path / "run").exists()


def test_held_out_samples_choose_the_best(tmp_path, tokenizer, pairs, samples, classifier):
    words = (
        f"held_out.latents={samples[0]}",
        f"held_out.extractor.path={classifier}",
        "steps=6",
        "snapshot_every=2",
    )
    out = tmp_path / "good"
    assert train_decoder(tiny.post_run(out, tokenizer, pairs, *words)) == out / "snapshot" / "best"
    values = {line["step"]: line["held_out"] for line in tiny.log(out) if "held_out" in line}
    assert sorted(values) == [0, 2, 4, 6]  # the original decoder is scored too
    best = min(values, key=values.get)
    header = yaml.safe_load((out / "snapshot" / "best" / "config.yaml").read_text())
    assert header["post_trained"]["steps"] == best
    source = weights(tokenizer / "snapshot" / "00000060") if best == 0 else weights(out / "snapshot" / f"{best:08d}")
    assert all(torch.equal(weights(out / "snapshot" / "best")[name], value) for name, value in source.items())


def test_a_decoder_that_only_gets_worse_is_not_kept(tmp_path, tokenizer, pairs, samples, classifier, monkeypatch):
    values = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(post_training, "_held_out_score", lambda *_: lambda decode: next(values))
    words = (
        f"held_out.latents={samples[0]}",
        f"held_out.extractor.path={classifier}",
        "steps=4",
        "snapshot_every=2",
    )
    path = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *words))
    untouched = weights(tokenizer / "snapshot" / "00000060")
    assert path.name == "best"
    assert all(torch.equal(weights(path)[name], value) for name, value in untouched.items())
    assert torch.equal(load_tokenizer(tmp_path / "run").decoder.mask_token, untouched["decoder.mask_token"])
    assert not torch.equal(weights(path.with_name("00000004"))["decoder.mask_token"], untouched["decoder.mask_token"])


@pytest.mark.parametrize("scored", [True, False])
def test_a_decoder_that_costs_too_much_is_refused(
    tmp_path, tokenizer, pairs, samples, classifier, monkeypatch, scored, capsys
):
    """The best of steps 0, 2, 4, 6 costs 2 dB; the next one half a dB."""
    values, prices = iter([5.0, 4.0, 1.0, 3.0]), iter([20.0, 19.5, 18.0, 19.6])
    monkeypatch.setattr(post_training, "_held_out_score", lambda *_: lambda decode: next(values))
    price = lambda *_, **__: lambda decode: {"psnr": next(prices)}  # noqa: E731
    monkeypatch.setattr(post_training, "reconstruction_score", price)
    words = ["steps=6", "snapshot_every=2", "max_reconstruction_loss=0.5"]
    words += [f"held_out.latents={samples[0]}", f"held_out.extractor.path={classifier}"] * scored
    path = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *words))
    assert path.name == "best"
    header = yaml.safe_load((path / "config.yaml").read_text())
    assert header["post_trained"]["steps"] == 6
    assert header["price"] == {"psnr": {"before": 20.0, "after": 19.6}}
    assert ("held_out" in header) is scored
    assert "| PSNR (dB) | 20 | 19.6 |" in (path / "README.md").read_text()
    assert "the decoder of step 4 is refused" in " ".join(capsys.readouterr().err.split())


def test_where_all_cost_too_much_the_decoder_stays_as_it_was(tmp_path, tokenizer, pairs):
    words = ("steps=2", "learning_rate=0.05", "data.limit=128", "max_reconstruction_loss=0")
    path = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *words))
    untouched, last = weights(tokenizer / "snapshot" / "00000060"), weights(path.with_name("00000002"))
    lines = [line["reconstruction_psnr"] for line in tiny.log(tmp_path / "run") if "reconstruction_psnr" in line]
    assert lines[0] > lines[1]
    assert all(torch.equal(weights(path)[name], value) for name, value in untouched.items())
    assert not torch.equal(last["decoder.mask_token"], untouched["decoder.mask_token"])


def test_the_snapshot_names_its_pairs(tokenizer, post_trained, pairs):
    header = yaml.safe_load((post_trained / "snapshot" / "00000006" / "config.yaml").read_text())
    assert header["post_trained"] == {"steps": 6, "pairs": 128, "sigma": 0.5, "mode": "direct"}
    assert header["latent_space"] == encoder_digest(load_tokenizer(tokenizer))
    assert json.loads((pairs / "manifest.json").read_text())["source"]["sigma"] == 0.5
