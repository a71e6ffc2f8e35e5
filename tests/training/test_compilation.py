"""With ``compile=true`` no training breaks a graph, and none compiles anything after its first step."""

import importlib.util
from pathlib import Path

import pytest
import torch

from robustok.config import read_yaml, recipe
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig, through_blocks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compilation.py"
spec = importlib.util.spec_from_file_location("compilation_benchmark", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
GRAPHS = {  # of an encoder and a decoder; a second pass in parts has a graph without and one with gradients
    "tokenizer, ViT, in 2 parts, checkpointing": 4,
    "tokenizer, gigatok": 5,  # and of the transformer between, whose first block has another memory layout
}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in diffusers
@pytest.mark.parametrize("name", script.CASES)
def test_every_training_compiles_once(tmp_path, name):
    if "diffusers" in name or name == "DiT":
        pytest.importorskip("diffusers")
    blocks = 2 if name.startswith("tokenizer") else 1
    assert script.count(name, tmp_path) == {"graphs": GRAPHS.get(name, blocks), "breaks": 0, "later": 0}


def test_a_break_would_be_counted(tmp_path, monkeypatch):
    def forward(block, x, _scales=None):
        print(end="")
        return x + block.mlp(x)

    monkeypatch.setattr("robustok.tokenizers.robustok.Block.forward", forward)
    assert script.count("post-training, ViT", tmp_path)["breaks"] > 0


def test_the_recipes_for_gpus_compile():
    for name in ("tokenizer", "generator-b", "generator-l", "generator-xl", "generator-xxl", "post"):
        assert read_yaml(recipe(f"imagenet256/{name}.yaml"))["compile"] is True


def backbone(drop_path, depth=3):
    size = ViTConfig(width=8, depth=depth, heads=2, drop_path=drop_path)
    torch.manual_seed(0)
    return RobusTok(RobusTokConfig(image_size=8, patch_size=4, encoder=size, decoder=size)).encoder.backbone


def test_drop_path_leaves_branches_out_and_keeps_the_mean():
    vit, x = backbone(0.5), torch.zeros(4000, 1, 8)
    torch.nn.init.normal_(x)
    whole = vit.eval().blocks(x)
    assert torch.equal(through_blocks(vit, x, 0.5), whole)  # not in evaluation
    vit.train()
    assert torch.equal(through_blocks(vit, x, 0.0), whole)
    for block in vit.blocks:  # each branch adds 1 whatever its input: the sum tells how many were kept, rescaled
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.ones_(layer.bias)
    added = (through_blocks(vit, x, 0.5) - x)[:, 0]  # (N, 8)
    assert (added - added[:, :1]).abs().max() < 1e-5
    assert added[:, 0].mean().item() == pytest.approx(6, abs=0.1)
    kept = [2 + a / 0.75 + b / 0.5 for a in range(3) for b in range(3)]  # rates 0, 0.25 and 0.5 of two branches each
    found = torch.tensor(kept)
    assert (added[:, :1] - found).abs().min(dim=1).values.max() < 1e-4
    share = ((added[:, :1] - found).abs() < 1e-4).float().mean(dim=0)  # of each outcome
    expected = torch.tensor([p * q for p in (0.0625, 0.375, 0.5625) for q in (0.25, 0.5, 0.25)])
    near = torch.stack([expected[(found - value).abs() < 1e-4].sum() for value in found])
    assert (share - near).abs().max() < 0.03
