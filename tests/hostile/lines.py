"""What can be wrong with a command line and the process that runs it: words, YAML, environment, signals, limits."""

import os
import resource
import signal
from itertools import pairwise
from pathlib import Path

from hostile.tries import Try
from robustok.cli import COMMANDS
from robustok.settings import list_settings

NUMBERS = "nan .nan .inf -.inf -1 0 -0.0 1e400 1e-400 1e99 0.5 010 0x10 1_000 1e3 ² 0.1.2 12:30:45".split()  # noqa: SIM905
NUMBERS += [str(2**31), str(2**63), str(2**64), "9" * 30, "9" * 5000]
TEXTS = "null no yes true 2024-05-01 2024-02-31 é .. . ~ ~nosuchuser * ** &a *a %s{0} in in/none name ' \"".split()  # noqa: SIM905
TEXTS += ["", " ", "\x1b[31m", "a\x00b", "\udcff", "\u202e", "a" * 300, "a" * 5000, "# x", "a #2", "\n", "a\nb"]
TEXTS += ["in/photos/*", "in/tokenizer@nan", "guard/secret.txt", "in/classifier", "hf://a/b"]
TREES = "[] {} [1,2 [[[[]]]] [nan] [null] [0,-1] [[1,2],[3]] [a,a] {a:b} <<:1".split()  # noqa: SIM905
TREES += ["{name: null}", "{name: []}", "{name: {}}", "{name: folder}", "{a: 1, a: 2}", "{1: 2}", "{null: 1}", "? x"]
TREES += [
    "!!python/object/apply:os.system [touch guard/pwned]",
    "!!binary x",
    "[" * 2000,
    "&a [*a]",
    "!!set {a}",
    "- - 1",
]
WORK = ("steps", "count", "samples", "sets", "seeds", "scale", "blocks", "depth")  # more of these is more work, rightly


def settings_words(t: Try) -> None:
    """A setting with a value of another type, size or form, or a word that is no setting."""
    key = t.one([setting.key for setting in list_settings(COMMANDS[t.valid.command].load()[1])])
    value = t.rng.choice(t.rng.choice([NUMBERS, TEXTS, TREES]))
    if t.rng.random() < 0.4:
        key = t.one([word.partition("=")[0] for word in t.valid.words[1:] if "=" in word])  # one that matters here
    if t.rng.random() < 0.1:
        key = t.one(["", ".", "a..b", f"{key}.", f"{key}.x", "__class__", "a." * 1000 + "a", "\x1b[2J", "é", key[1:]])
    if key.split(".")[0] in ("out", "cache") and (value.strip() in ("", ".", "..", "~", "in") or "/" in value):
        value = "x/y"
    t.free_out = key in ("out", "cache")
    if (key.endswith(WORK) and value in NUMBERS) or key in ("open", "watch"):  # a browser; until Ctrl-C
        t.words.append("--dry-run")
    if t.rng.random() < 0.95:
        t.words = [word for word in t.words if word.partition("=")[0] != key]
    t.words.append(key if t.rng.random() < 0.03 else f"{key}={value}")
    t.notes.append(t.words[-1])
    t.again = True


YAML = ["", "[]", "1", "a: b", "a: [", "\t\tx", "a: 1\na: 2\n", "? a", "- a", "%YAML 9.9", "a: *x", "x: \x07", "1: 2"]
YAML += ["null: 3", "settings: []", "settings: {}", "settings: {x: 1}", "data: {name: {a: 1}}", "data: [1]", "out: [x]"]
YAML += ["data: 2024-02-31", "? [1, 2]\n: 3", "a: " + "[" * 3000, "{" * 3000, "a: &a {b: *a}", "<<: {steps: 1}"]
YAML += ["steps: 1e400", f"steps: {'9' * 5000}", "a: !!timestamp x", "data: !!binary '*'", "a: !!python/name:os.system"]
YAML += ["a: &a [x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefg"))]


def yaml_files(t: Try) -> None:
    """A configuration file that is odd or no YAML."""
    text = t.one([*YAML, f"settings: {{{t.valid.command}: [1]}}"]).encode()
    if t.rng.random() < 0.3:
        text = t.one([b"\xff\xfe" + text, b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b"\x00" * 9])
    file = t.one(["in/x.yaml", "in/x.yml", "in/x [1].yaml", "in/é.yaml"])
    Path(file).write_bytes(text)
    t.words.insert(1, file)
    if t.rng.random() < 0.1:
        t.words.insert(
            1, t.one(["guard/no.yaml", "in.yaml", "digits/post.yaml", ".yaml", "a" * 300 + ".yaml", "guard"])
        )


ENVIRONMENT = {  # names to values
    "RANK LOCAL_RANK": "0 1 7 x -1",
    "WORLD_SIZE PMI_SIZE OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE": "0 2 4 x",
    "PMI_RANK OMPI_COMM_WORLD_RANK SLURM_PROCID MASTER_PORT": "1 x",
    "ACCELERATE_MIXED_PRECISION": "fp16 fp8 bf16 x",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4 0 x",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR x",
    "ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_CPU ACCELERATE_DISPATCH_BATCHES ACCELERATE_DEBUG_MODE": "false 1 x",
    "HOME TMPDIR HF_HOME XDG_CACHE_HOME": "/nonexistent",
    "LANG LC_ALL TERM COLUMNS ROBUSTOK_PROGRESS NO_COLOR FORCE_COLOR": "C xx dumb 0 1",
    "PYTHONIOENCODING": "ascii latin-1",
    "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS": "x 1",
}


def environment(t: Try) -> None:
    """Variables that launchers leave behind, or that are nonsense."""
    for names in t.rng.sample(sorted(ENVIRONMENT), t.rng.choice([1, 1, 2, 3])):
        t.env[t.one(names)] = t.one(ENVIRONMENT[names])
    t.again = True


def killed(t: Try) -> None:
    """A signal at a random moment; afterwards the same command goes on."""
    number = t.one([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    t.signal = number, t.rng.uniform(0.02, 0.02 + 1.2 * t.valid.seconds)
    t.notes.append(f"after {t.signal[1]:.3f} s")
    t.again = True


def full_disk(t: Try) -> None:
    """No file may be larger than so many bytes, as on a full disk; or stdout is closed, or few files may be open."""
    how = t.rng.random()
    if how < 0.8:
        t.limits[resource.RLIMIT_FSIZE] = t.one([0, 1, 10, 100, 1000, 5000, 20_000, t.rng.randrange(200_000)])
    elif how < 0.9:
        t.limits[resource.RLIMIT_NOFILE] = t.one([8, 12, 16])
    else:
        t.closed = True
    t.again = True


def permissions(t: Try) -> None:
    """What may not be read or written, for a user without rights."""
    t.user = 65534 if os.getuid() == 0 else None
    t.again = t.rng.random() < 0.3
    path = Path() if t.again else t.one(t.inputs())
    path.chmod(0o555 if t.again else t.one([0, 0o111, 0o444, 0o222]))
