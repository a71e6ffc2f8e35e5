import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from robustok.config import (
    Config,
    differences,
    load,
    plain,
    read_yaml,
    recipe,
    save,
    validate,
)
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.settings import list_settings


class Circle(Config):
    name: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0, description="in metres")
    colour: str = Field("red", description="of the line")


class Box(Config):
    name: Literal["box"] = "box"
    path: Path = Field(description="path of the file")
    colour: str = Field("red", description="of the line")


class Inner(Config):
    width: int = Field(8, ge=1, description="in pixels")
    depth: int = Field(2, description="number of blocks")


class Run(Config):
    out: Path = Field(description="the folder")
    steps: int = Field(100, ge=1, description="number of steps")
    seeds: list[int] = Field([0], description="seeds")
    betas: tuple[float, float] = Field((0.9, 0.95), description="two numbers")
    model: Inner = Inner(depth=5)
    extra: Inner | None = Field(None, description="off by default")
    shape: Annotated[Circle | Box, Field(discriminator="name")] = Circle()

    @model_validator(mode="after")
    def _even(self):
        if self.steps % 2:
            raise ValueError(f"steps {self.steps} are odd; choose an even number")
        return self


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_words_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", {"out": "x", "steps": 20, "model": {"width": 16}})
    run = load(Run, file, ["steps=40", "seeds=[3,4]", "shape.radius=2.5", "betas=[0, 0.5]"])
    assert (run.out, run.steps, run.seeds, run.betas) == (Path("x"), 40, [3, 4], (0.0, 0.5))
    assert (run.model.width, run.shape.radius, run.extra) == (16, 2.5, None)


def test_choosing_another_variant_drops_the_settings_of_the_one_before(tmp_path):
    file = write(tmp_path / "a.yaml", {"out": "x", "shape": {"name": "circle", "radius": 3}})
    run = load(Run, file, ["shape.name=box", "shape.path=here"])
    assert run.shape == Box(path=Path("here"))


def test_what_is_saved_repeats_the_run(tmp_path):
    run = load(Run, None, ["out=x", "shape.name=box", "shape.path=p", "extra.width=3", "betas=[0.1,0.2]"])
    save(run, tmp_path / "b.yaml")
    assert load(Run, tmp_path / "b.yaml") == run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stesp=3"], ["'stesp'", "'steps'"]),
        (["model.widht=3"], ["'model.widht'", "'model.width'"]),
        (["modle.width=3"], ["'modle'", "'model'"]),
        (["width=3"], ["'width'", "'model.width'"]),
        (["shape.name=circle", "shape.radios=3"], ["'shape.radios'", "'shape.radius'"]),
        (["zzz=3"], ["'zzz'", "known: out, steps"]),
        (["steps=many"], ["steps = 'many'", "integer"]),
        (["steps=0"], ["steps = 0", "greater than or equal to 1"]),
        (["steps=3"], ["steps 3 are odd; choose an even number"]),
        (["shape.name=star"], ["shape", "'star'", "'circle'", "'box'"]),
        (["shape.name=box"], ["'shape.path' is missing", "path of the file"]),
        (["shape.path=x"], ["'shape.path' belongs to another variant", "shape.name=box"]),
        (["shape.radius=-1"], ["shape.radius = -1", "greater than 0"]),
        (["betas=[1]"], ["betas"]),
        (["steps"], ["'steps'", "KEY=VALUE"]),
        (["=3"], ["'=3'", "KEY=VALUE"]),
        (["steps=12:30"], ["steps = '12:30'", "integer"]),
        (["steps=true"], ["steps = 'true'", "integer"]),
        (["steps="], ["steps = None", "integer; it is empty, give a value"]),
        (["shape.radius=nan"], ["shape.radius = 'nan'", "finite"]),
        (["shape.radius=1e999"], ["shape.radius = inf", "finite"]),
        ([f"steps={2**64}"], ["steps = 18446744073709551616", "the largest is 2^64 - 1"]),
        ([f"steps={'9' * 5000}"], ["steps = '999", "... (5,002 characters)"]),
        ([f"{'a' * 5000}=1"], ["unknown key 'aaa", "... (5,002 characters)"]),
        ([f"{'a.' * 5000}=1"], ["expected KEY=VALUE"]),
        (["seeds=0,1"], ["seeds = '0,1'", "write seeds=[0,1]"]),
        (["seeds=" + "[" * 5000], ["seeds = '[[["]),
        (["model=wide"], ["model = 'wide': a group of settings; write model.KEY=VALUE, such as model.width=..."]),
        (["shape=circle"], ["shape = 'circle': a group of settings; write shape.name=circle"]),
    ],
)
def test_an_error_is_one_line_that_names_key_and_remedy(words, said):
    with pytest.raises(UserError) as error:
        load(Run, None, ["out=x", *words])
    line = str(error.value)
    assert "\n" not in line
    for part in said:
        assert part in line


class Texts(Config):
    path: Path = Field(Path("x"), description="a file")
    weights: Path | None = Field(None, description="a file, or none")
    title: str | None = Field(None, description="a text, or none")
    paths: list[Path] = Field([], description="files")
    named: dict[str, Path] = Field({}, description="files by name")
    tags: dict[str, str | float | int] = Field({}, description="texts or numbers")
    free: dict[str, Any] = Field({}, description="anything")
    number: float = Field(0, description="a number")
    share: float | Literal["auto"] | None = Field(None, description="a number, or auto")
    on: bool = Field(False, description="a switch")


WRITTEN = [
    "set #2",
    "123",
    "no",
    "2024-05-01",
    "2024-02-31",
    "010",
    "1e5",
    "a: b",
    "*.parquet",
    "x [cfg=1.5].npz",
    "{x}",
    "!a",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_paths_and_texts_are_taken_as_they_are_written(tmp_path, text):
    keys = {"path": "path", "weights": "weights", "title": "title", "named": "named.a"}
    run = load(Texts, None, [f"{key}={text}" for key in (*keys.values(), "tags.a")])
    assert (run.path, run.weights, run.title) == (Path(text), Path(text), text)
    assert run.named == {"a": Path(text)}
    assert run.tags == {"a": int(text) if text == "123" else text}
    save(run, tmp_path / "a.yaml")
    assert load(Texts, tmp_path / "a.yaml") == run


def test_plain_words_of_a_file_are_what_the_setting_takes(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "path: 010\nweights: no\ntitle: 2024-05-01\npaths: [1, no, 1e5, 'null']\nnamed: {1: 2}\n"
        "tags: {a: no, b: 0.50, c: 007, d: 1e5, e: 3, f: '3'}\nnumber: 1e-4\nshare: 0.5\non: yes\n"
        "free: {a: no, b: 0x10, c: [1, .5, true, null], d: 010, e: 2024-05-01}\n"
    )
    run = load(Texts, file)
    assert (run.path, run.weights, run.title) == (Path("010"), Path("no"), "2024-05-01")
    assert (run.paths, run.named) == ([Path("1"), Path("no"), Path("1e5"), Path("null")], {"1": Path("2")})
    assert run.tags == {"a": "no", "b": 0.5, "c": "007", "d": "1e5", "e": 3, "f": "3"}
    assert (run.number, run.share, run.on) == (1e-4, 0.5, True)
    assert run.free == {"a": "no", "b": 16, "c": [1, 0.5, True, None], "d": "010", "e": "2024-05-01"}
    assert read_yaml(file)["number"] == 1e-4


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("1_000", 1000), ("0x10", 16), ("1e3", 1000), ("+5", 5), ("2.0", 2), ("0o10", 8)]
)
def test_numbers_are_decimal(text, number):
    assert load(Inner, None, [f"width={text}"]).width == number


def test_nothing_and_quotes():
    for text in ("null", "~", ""):
        run = load(Texts, None, [f"weights={text}", f"title={text}", f"share={text}"])
        assert (run.weights, run.title, run.share) == (None, None, None)
    assert load(Texts, None, ["title='null'", 'path="a b"']) == Texts(title="null", path="a b")
    for text in ("", "''"):
        with pytest.raises(UserError, match=r"path = None: .*it is empty, give a value"):
            load(Texts, None, [f"path={text}"])


def test_a_later_word_wins(tmp_path):
    file = write(tmp_path / "a.yaml", {"out": "x", "shape": {"name": "circle", "radius": 3}})
    assert load(Run, file, ["shape.path=here", "shape.name=box"]).shape == Box(path=Path("here"))
    assert load(Run, file, ["model.depth=3", "model={width: 4}"]).model == Inner(width=4)


def test_a_home_folder_is_expanded_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run = load(Texts, None, ["path=~/a", "paths=[~/b, c]", "named.x=~", "weights=~/d"])
    assert (run.path, run.weights) == (Path("/home/me/a"), Path("/home/me/d"))
    assert (run.paths, run.named) == ([Path("/home/me/b"), Path("c")], {"x": Path("/home/me")})
    assert Texts(path="~/a").path == Path("/home/me/a")
    for words, said in (
        (["path=~nosuchuser/a"], "path = '~nosuchuser/a': there is no user nosuchuser whose home"),
        (['path="a\\0b"'], "a path cannot hold a zero byte"),
    ):
        with pytest.raises(UserError, match=said):
            load(Texts, None, words)


def test_a_name_that_is_not_utf8_survives_saving(tmp_path):
    run = load(Texts, None, [f"path={os.fsdecode(bytes([97, 255]))}"])
    save(run, tmp_path / "a.yaml")
    assert os.fsencode(load(Texts, tmp_path / "a.yaml").path) == b"a\xff"


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="'out' is missing; the folder"):
        load(Run)


def test_a_variant_without_default_has_to_be_named():
    class Needs(Config):
        shape: Annotated[Circle | Box, Field(discriminator="name")] = Field(description="which one")

    with pytest.raises(UserError, match=r"'shape.name' is missing; which one: one of box, circle$"):
        load(Needs, None, ["shape.colour=blue"])
    with pytest.raises(UserError, match="'shape' is missing; which one"):
        load(Needs)
    assert load(Needs, None, ["shape.name=box", "shape.path=p"]).shape == Box(path="p")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "holds a list, expected a mapping"),
        ("a", "holds a text, expected a mapping"),
        (b"\xff\xfe", "not a text file in UTF-8"),
        ("steps: 2\nsteps: 4", "the key 'steps' is there twice, in line 1"),
        ("model: {width: 2, width: 4}", "the key 'width' is there twice"),
        ("a: " + "[" * 5000, "more than 50 deep"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 deep"),
        ("a: &a [*a]", "more than 100,000 values once aliases"),
        ("a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)), "more than 100,000"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: !!int [1]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("settings: null", "must hold the settings of commands"),
        ("settings: {encode: [1]}", "must hold the settings of commands"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, said):
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        load(Run, file)
    with pytest.raises(UserError, match="No such file"):
        load(Run, tmp_path / "none.yaml")


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load(Run, write(tmp_path / "a.yaml", ""), ["out=x"]) == Run(out="x")


def test_validation_names_its_source():
    with pytest.raises(UserError, match=r"^there: steps = 'a'"):
        validate(Run, {"out": "x", "steps": "a"}, source="there")


class Outer(Config):
    inner: Run


class Drawer(Config):
    name: Literal["drawer"] = "drawer"
    line: Inner = Inner()


class Eraser(Config):
    name: Literal["eraser"] = "eraser"


class Tool(Config):
    tool: Annotated[Drawer | Eraser, Field(discriminator="name")] = Drawer()


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        (Run, ["out=x", "steps=3"], "the settings: steps 3 are odd; choose an even number"),
        (Outer, ["inner.out=x", "inner.steps=3"], "the settings: inner: steps 3 are odd; choose an even number"),
        (Run, ["out=x", "shape.name=cube"], "the settings: shape.name = 'cube': expected one of 'circle', 'box'"),
        (Outer, ["inner.shape.path=x"], "'inner.shape.path' belongs to another variant; set inner.shape.name=box,"),
        (Tool, ["tool.name=eraser", "tool.line.width=1"], "belongs to another variant; set tool.name=drawer, or"),
    ],
)
def test_an_error_names_the_setting_to_change(model, words, said):
    with pytest.raises(UserError) as caught:
        load(model, None, words)
    assert said in str(caught.value)
    assert "{" not in str(caught.value)


def test_a_tilde_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    words = ["out=~/o", "tokenizer=~/t", "samples.latents=[~/a, b]", "samples.decoders.x=~/d", "data.path=~/i"]
    run = load(EvaluateRun, words=[*words, "data.name=folder", "metrics=[psnr]"])
    assert (str(run.out), str(run.tokenizer)) == ("/home/ann/o", "/home/ann/t")
    assert list(map(str, run.samples.latents)) == ["/home/ann/a", "b"]
    assert (str(run.samples.decoders["x"]), str(run.data.path)) == ("/home/ann/d", "/home/ann/i")
    with pytest.raises(UserError, match="out = '~nosuchuser/o': there is no user nosuchuser whose home"):
        load(EvaluateRun, words=["out=~nosuchuser/o", "tokenizer=t", "data.name=digits", "metrics=[psnr]"])


def test_values_do_not_change_after_validation():
    with pytest.raises(ValueError, match="frozen"):
        Run(out="x").steps = 4


def test_differences_are_dotted_and_complete():
    a = plain(Run(out="x"))
    b = plain(Run(out="x", steps=4, model={"width": 9, "depth": 5}, shape=Box(path="p")))
    assert differences(a, a) == []
    assert differences(a, b) == [
        "model.width: 8 -> 9",
        "shape.name: circle -> box",
        "shape.path: None -> p",
        "shape.radius: 1.0 -> None",
        "steps: 100 -> 4",
    ]


def test_a_path_that_exists_wins_over_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe("nothing.yaml") == Path("nothing.yaml")
    shipped = recipe("digits/tokenizer.yaml")
    assert shipped.is_absolute()
    assert shipped.parts[-3:] == ("configs", "digits", "tokenizer.yaml")
    (tmp_path / "digits").mkdir()
    own = write(tmp_path / "digits" / "tokenizer.yaml", "")
    assert recipe("digits/tokenizer.yaml").resolve() == own


def test_settings_list_every_key_with_its_default_and_description():
    found = [(s.key, s.default, s.description, s.variants) for s in list_settings(Run)]
    assert found == [
        ("out", None, "the folder", ()),
        ("steps", "100", "number of steps", ()),
        ("seeds", "[0]", "seeds", ()),
        ("betas", "[0.9, 0.95]", "two numbers", ()),
        ("model.width", "8", "in pixels", ()),
        ("model.depth", "5", "number of blocks", ()),  # of the default instance, not of the class
        ("extra", "null", "off by default", ()),
        ("extra.width", "8", "in pixels", ()),
        ("extra.depth", "2", "number of blocks", ()),
        ("shape.name", "circle", "one of box, circle", ()),
        ("shape.radius", "1.0", "in metres", ("circle",)),
        ("shape.colour", "red", "of the line", ()),
        ("shape.path", None, "path of the file", ("box",)),
    ]


class Release(Config):
    weights: Path = Field(description="the file")
    kind: str | None = Field(None, description="of what")


class Source(Config):
    tokenizer: Annotated[
        Annotated[Path, Tag("path")] | Annotated[Release, Tag("group")],
        Discriminator(lambda value: "group" if isinstance(value, dict | Release) else "path"),
    ] = Field(description="a path, or")


def test_a_path_may_stand_for_a_group(tmp_path):
    recipe = write(tmp_path / "a.yaml", {"tokenizer": {"kind": "new"}})
    assert load(Source, recipe, ["tokenizer.weights=a.pt"]).tokenizer == Release(weights=Path("a.pt"), kind="new")
    assert load(Source, recipe, ["tokenizer=runs/a"]).tokenizer == Path("runs/a")
    assert load(Source, recipe, ["tokenizer=4"]).tokenizer == Path("4")
    assert load(Source, recipe, ["tokenizer={weights: a.pt}"]).tokenizer == Release(weights=Path("a.pt"))
    assert load(Source, write(tmp_path / "b.yaml", {"tokenizer": "b"}), ["tokenizer.weights=a"]).tokenizer.kind is None
    run = load(Source, recipe, ["tokenizer.weights=a.pt"])
    assert validate(Source, plain(run)) == run
    keys = [(s.key, s.default) for s in list_settings(Source)]
    assert keys == [("tokenizer", None), ("tokenizer.weights", None), ("tokenizer.kind", "null")]
    for words, said in (
        (["tokenizer.weihgts=a"], r"unknown key 'tokenizer\.weihgts'; did you mean 'tokenizer\.weights'"),
        ([], r"'tokenizer\.weights' is missing; the file"),
    ):
        with pytest.raises(UserError, match=said):
            load(Source, recipe, words)


# Several files


def test_later_files_win_and_variants_are_not_mixed(tmp_path):
    first = write(tmp_path / "a.yaml", {"out": "x", "steps": 20, "model": {"width": 16, "depth": 3}})
    second = write(tmp_path / "b.yaml", {"steps": 40, "model": {"width": 8}, "shape": {"radius": 2}})
    third = write(tmp_path / "c.yaml", {"shape": {"name": "box", "path": "p"}})
    run = load(Run, [first, second], ["seeds=[5]"])
    assert (run.steps, run.model.width, run.model.depth, run.seeds, run.shape.radius) == (40, 8, 3, [5], 2)
    assert load(Run, [first, second, third]).shape == Box(path=Path("p"))  # without the circle's radius
    assert load(Run, [second, first]).steps == 20
    with pytest.raises(UserError, match=r"a\.yaml \+ .*d\.yaml: unknown key 'stebs'; did you mean 'steps'"):
        load(Run, [first, write(tmp_path / "d.yaml", {"stebs": 2})])


def test_a_preset_has_settings_for_several_commands(tmp_path):
    recipe = write(tmp_path / "a.yaml", {"out": "x", "model": {"width": 16}})
    settings = {"main-train": {"model": {"depth": 2}}, "post-train": {"steps": 4}}
    preset = write(tmp_path / "preset.yaml", {"settings": settings})
    run = load(Run, [recipe, preset], command="main-train")
    assert (run.model.width, run.model.depth, run.steps) == (16, 2, 100)
    assert load(Run, [recipe, preset], command="post-train").steps == 4
    with pytest.raises(UserError, match=r"preset\.yaml holds settings for main-train, post-train, not for encode"):
        load(Run, [recipe, preset], command="encode")
