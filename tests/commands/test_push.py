"""Snapshots and deltas to a hub that the test serves, and back from it."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import robustok
from conftest import words
from hub_server import TOKEN, serving
from robustok.cli import main
from robustok.errors import UserError
from robustok.files import write_file
from robustok.generators import load_generator
from robustok.hub import download_snapshot
from robustok.tokenizers import load_tokenizer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    download_snapshot.cache_clear()
    with serving(monkeypatch, tmp_path / "hub-cache") as hub:
        yield hub


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def run(capsys, *words):
    capsys.readouterr()
    code = main(list(map(str, words)))
    return code, *capsys.readouterr()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_post_trained_tokenizer_goes_to_the_hub_and_comes_back(pipeline, tmp_path, hub, token, capsys):
    measured = {"metric": "rfid", "value": 12.345, "standard_error": None, "samples": 40, "seed": 0}
    measured |= {"extractor": "classifier-8", "reference": "digits <test>", "tokenizer": "/home/me/runs/post"}
    cell = measured | {"metric": "pfid@0.1"}
    write_file(tmp_path / "evaluation" / "metrics.jsonl", f"{json.dumps(measured)}\n{json.dumps(cell)}\n")
    settings = (f"metrics={tmp_path / 'evaluation'}", "base=me/original", "licence=mit", "private=true")
    code, out, err = run(capsys, "push", pipeline / "post", "me/tok", *settings)
    assert code == 0, err
    assert f"url: {hub.address}/me/tok\nload: hf://me/tok\n" in out
    files = hub.repositories["me/tok"]
    assert set(files) == {"README.md", "config.yaml", "discriminator.safetensors", "model.safetensors", "picture.png"}
    assert files["picture.png"].startswith(b"\x89PNG")
    assert hub.private == {"me/tok"}
    assert {found for method, _, found in hub.requests if method == "POST"} == {TOKEN}

    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("robustok", "me/original")
    assert "| rfid | 12.35 | 40 | post | classifier-8 | digits &lt;test> |" in card.text
    assert "pfid@" not in card.text
    assert 'load_tokenizer("hf://me/tok")' in card.text
    assert "![](picture.png)" in card.text
    assert b"/home/me" not in files["README.md"] + files["config.yaml"]

    assert same(load_tokenizer("hf://me/tok"), load_tokenizer(pipeline / "post"))
    out = tmp_path / "latents"
    encode = words("encode", pipeline, str(out))
    code, _, err = run(capsys, *encode, "tokenizer=hf://me/tok")
    assert code == 0, err
    assert json.loads((out / "manifest.json").read_text())["count"] > 0


def test_a_generator_and_its_latents_go_on_in_post_training(pipeline, tmp_path, hub, token, capsys):
    """As another person would, who has nothing but the two addresses."""
    assert run(capsys, "push", pipeline / "tokenizer", "me/tok")[0] == 0
    assert run(capsys, "push", pipeline / "generator", "me/gen", "licence=mit")[0] == 0
    assert ModelCard(hub.repositories["me/gen"]["README.md"].decode()).data.license == "mit"
    assert same(load_generator("hf://me/gen"), load_generator(pipeline / "generator"))
    code, _, err = run(capsys, "generate", "generator=hf://me/gen", "count=4", f"out={tmp_path / 'samples'}")
    assert code == 0, err
    post = [word for word in words("post-train", pipeline, str(tmp_path / "post")) if not word.startswith("tokenizer=")]
    code, _, err = run(capsys, *post, "tokenizer=hf://me/tok")
    assert code == 0, err
    code, _, err = run(capsys, *post, "tokenizer=hf://me/tok")  # the same command again
    assert code == 0, err


def test_a_delta_is_loaded_with_its_original_from_the_hub(pipeline, tmp_path, hub, token, capsys):
    delta = tmp_path / "delta"
    made = (f"tokenizer={pipeline / 'tokenizer'}", f"post_trained={pipeline / 'post'}", f"out={delta}")
    assert run(capsys, "make-delta", *made)[0] == 0
    code, _, err = run(capsys, "push", delta, "me/delta")
    assert (code, err.count("\n")) == (2, 1)
    assert "which others do not have; push that first, then give base=ORG/NAME" in err
    assert run(capsys, "push", pipeline / "tokenizer", "me/tok")[0] == 0
    assert run(capsys, "push", delta, "me/delta", "base=me/tok")[0] == 0
    assert yaml.safe_load(hub.repositories["me/delta"]["config.yaml"])["delta"]["base"] == "hf://me/tok"
    assert ModelCard(hub.repositories["me/delta"]["README.md"].decode()).data.base_model == "me/tok"
    shutil.rmtree(delta)
    assert same(load_tokenizer("hf://me/delta"), load_tokenizer(pipeline / "post"))
    assert same(load_tokenizer("hf://me/delta@0"), load_tokenizer(pipeline / "tokenizer"))


def test_a_tokenizer_in_memory_goes_to_the_hub(pipeline, hub, token):
    tokenizer = robustok.load_tokenizer(pipeline / "tokenizer")
    with torch.no_grad():
        next(tokenizer.decoder_modules()[0].parameters()).add_(1)
    pushed = robustok.push_to_hub(tokenizer, "me/mine", licence="apache-2.0")
    assert same(robustok.load_tokenizer(pushed.load), tokenizer)
    assert ModelCard(hub.repositories["me/mine"]["README.md"].decode()).data.license == "apache-2.0"


def test_a_private_model_needs_the_token(pipeline, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    robustok.push(robustok.PushRun(path=pipeline / "tokenizer", to="me/tok", private=True))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"cannot download .* of me/tok .*check address and network"):
        load_tokenizer("hf://me/tok")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(load_tokenizer("hf://me/tok"), load_tokenizer(pipeline / "tokenizer"))


@pytest.mark.parametrize(
    ("words", "secret", "said"),
    [
        (["me/tok"], None, "no token to write me/tok; set HF_TOKEN in the environment, or run `hf auth login` once"),
        (["me/tok"], "hf_wrong", "cannot upload to me/tok (HfHubHTTPError:"),
        (["tok"], TOKEN, "got tok, expected ORG/NAME"),
        ([], TOKEN, "'to' is missing"),
        (["me/tok", "picture=nowhere.png"], TOKEN, "cannot read nowhere.png"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(pipeline, hub, monkeypatch, capsys, words, secret, said):
    if secret is not None:
        monkeypatch.setenv("HF_TOKEN", secret)
    code, out, err = run(capsys, "push", pipeline / "tokenizer", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert hub.repositories == {}


def test_a_repository_without_a_snapshot_or_a_network_is_one_line(pipeline, hub, capsys, tmp_path):
    hub.repositories["me/other"] = {"model.safetensors": b"x", "config.json": b"{}"}
    encode = words("encode", pipeline, str(tmp_path / "latents"))
    code, _, err = run(capsys, *encode, "tokenizer=hf://me/other")
    assert (code, err.count("\n")) == (2, 1), err
    assert "hf://me/other holds no snapshot of robustok" in err
    hub.shutdown()
    hub.server_close()
    code, _, err = run(capsys, *encode, "tokenizer=hf://me/tok")
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot download the folder of me/tok" in err
