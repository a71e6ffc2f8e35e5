"""The `app` command: the same latents through the untouched and the post-trained decoder, in a browser.

    robustok app runs

First what is shown, then the page, with gradio (the extra ``app``): it is served to this computer alone, and its files
are in a temporary folder.
"""

import math
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustok.commands.generate import sampling_of
from robustok.commands.run_models import Opened, find, open_run
from robustok.config import Config
from robustok.console import note
from robustok.data.pixels import to_pixels
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.generators.pipeline import PipelineGenerator
from robustok.randomness import hashed_rng, image_rngs
from robustok.tokenizers.deltas import apply_delta

SCREEN = 640  # width in pixels to which small pictures are enlarged
LARGE = 128  # images of this size and more are shown one at a time, unless more are asked for
HOST = "127.0.0.1"


class AppRun(Config):
    """What the app shows, and where."""

    path: Path = Field(Path("runs"), description="a post-training run, or a folder of runs")
    port: int | None = Field(None, ge=1, le=65535, description="port on this computer; null: the first free from 7860")


@dataclass(frozen=True)
class View:
    """What the page shows: pictures (H, W, 3) uint8, each of several images side by side.

    Attributes:
        before: from the untouched decoder.
        after: the same latents from the post-trained one.
        difference: how far they are apart, as strong as it can be shown.
        words: how far in numbers.
    """

    before: np.ndarray
    after: np.ndarray
    difference: np.ndarray
    words: str


class Viewer:
    """The runs of a folder, of which the one in use is in memory.

    Args:
        root: a run folder, or a folder of them.
        device: where to sample and decode.

    Raises:
        UserError: the folder is missing, or nothing in it was post-trained.
    """

    def __init__(self, root: Path, device: torch.device | str = "cpu") -> None:
        self.found, self.device = find(root), torch.device(device)
        self.open = lru_cache(maxsize=1)(self._open)
        self.latents = lru_cache(maxsize=8)(self._latents)
        self._prompted = lru_cache(maxsize=1)(_prompted)
        self._lock = threading.Lock()  # the weights of ``mixed`` change

    def _open(self, name: str) -> Opened:
        if name not in self.found.post_trained:
            raise UserError(f"no run {name!r}; there are {', '.join(self.found.post_trained)}")
        return open_run(self.found.post_trained[name], self.found, self.device)

    @torch.no_grad()
    def _latents(self, name: str, label: str, seed: int, sigma: float, count: int) -> Tensor:
        """Free samples of a class, or their mixtures with latents of real images of it: (N, L) or (N, L, D)."""
        opened = self.open(name)
        generator = opened.generator
        if label in opened.names:
            number = opened.names.index(label)
        elif isinstance(generator, PipelineGenerator):
            generator, number = self._prompted(generator, label), 0
        else:
            raise UserError(f"no class {label!r}; there are {', '.join(opened.names)}")
        labels = torch.full((count,), number)
        if isinstance(generator, PipelineGenerator):
            generator.embed(labels)
        reference, sampling = None, generator.sampling
        if sigma:
            if opened.real is None:
                raise UserError("sigma above 0 needs latents of real images of this tokenizer (`robustok encode`)")
            rows = (opened.real.labels == opened.names.index(label)).nonzero()[0] if label in opened.names else ()
            if not len(rows):
                raise UserError(f"no latents of real images of {label!r} in {opened.real.path}; set sigma to 0")
            chosen = torch.randint(len(rows), (count,), generator=hashed_rng(f"{seed}/real images"))
            reference = opened.real.read(rows[chosen.numpy()]).latents.to(self.device)
            sampling = sampling_of(opened.real, generator, sampling)
        return generator.generate(labels, sampling, image_rngs(seed, range(count)), reference, sigma)

    @torch.no_grad()
    def show(self, name: str, label: str, seed: int, sigma: float, strength: float, count: int | None = None) -> View:
        """The same latents through both decoders.

        Args:
            name: of the run, one of ``found.post_trained``.
            label: a class or prompt; of pipelines any prompt.
            seed: of the samples.
            sigma: share of the latents of real images that is kept; 0 is a free sample.
            strength: of what post-training changed: 0 is the untouched decoder, 1 the post-trained one.
            count: images; None takes sixteen small ones, or one.

        Raises:
            UserError: there is no such run or class, or sigma is above 0 without latents of real images.
        """
        with self._lock:
            opened = self.open(name)
            count = count or (1 if opened.original.image_size >= LARGE else 16)
            latents = self.latents(name, label or "", int(seed or 0), float(sigma), int(count)).to(self.device)
            opened.mixed.load_state_dict(opened.original.state_dict())
            apply_delta(opened.mixed, opened.delta, strength)
            before, after = (to_pixels(t.decode(latents)).cpu() for t in (opened.original, opened.mixed))
        change = (after.int() - before.int()).abs()
        most = int(change.max())
        gain = 255 / max(1, most)
        words = f"Difference: {change.float().mean():.2f} of 255 on average, {most} at most"
        words += f"; shown {gain:.1f} times as strong." if most else ": both decoders give the same pixels."
        return View(sheet(before), sheet(after), sheet((change * gain).round()), words)


def _prompted(generator: PipelineGenerator, prompt: str) -> PipelineGenerator:
    """The same pipeline with another prompt."""
    made = PipelineGenerator(generator.config, [prompt], generator.identity).to(generator.device)
    made.sampling = generator.sampling
    return made


def sheet(pixels: Tensor) -> np.ndarray:
    """Pixels (N, 3, H, W) as one picture (rows, columns, 3) with white lines, small ones enlarged by a whole number."""
    columns, (n, _, height, width) = math.ceil(math.sqrt(len(pixels))), pixels.shape
    rows, line = math.ceil(n / columns), max(1, height // 64)
    canvas = np.full((rows * columns, height + line, width + line, 3), 255, np.uint8)
    canvas[:n, :height, :width] = pixels.permute(0, 2, 3, 1).numpy()
    canvas = canvas.reshape(rows, columns, *canvas.shape[1:]).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    picture = canvas.reshape(rows * (height + line), -1, 3)[:-line, :-line]
    factor = max(1, SCREEN // picture.shape[1])
    return picture.repeat(factor, 0).repeat(factor, 1)


# The page


def app(run: AppRun) -> Path:
    """Serve the page on this computer until Ctrl-C.

    Returns:
        The folder that was shown.

    Raises:
        UserError: gradio is missing, the port is taken, or the folder holds nothing that was post-trained.
    """
    if "RANK" in os.environ:
        raise UserError("the app is one process; run it without torchrun or accelerate launch")
    viewer = Viewer(run.path, start_accelerator().device)
    with tempfile.TemporaryDirectory(prefix="robustok-app-") as folder:
        page = serve(viewer, Path(folder), run.port)
        note(f"{page.local_url} shows {len(viewer.found.post_trained)} post-trained decoders; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            note("ended")
        finally:
            page.close(verbose=False)
    return run.path


def serve(viewer: Viewer, folder: Path, port: int | None = None) -> Any:
    """Start to serve the page on the loopback interface, in threads of its own.

    Args:
        viewer: the runs.
        folder: where gradio writes its pictures.
        port: None takes the first free one from 7860.

    Returns:
        The running ``gradio.Blocks``, with ``local_url`` and ``close()``.

    Raises:
        UserError: gradio is missing, or the port is taken.
    """
    # Read when gradio is imported or asks: no telemetry, no question for a newer version, no file elsewhere.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    try:
        page = build_page(viewer)
    except ImportError as error:
        raise UserError(f"the app needs gradio ({error}); pip install 'robustok[app]'") from None
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=HOST,
            server_port=port,
            share=False,
            run_history=False,
            mcp_server=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"cannot serve on {HOST}: {error}; choose another port=NUMBER") from None
    return page


def build_page(viewer: Viewer) -> Any:
    """The page, a ``gradio.Blocks``."""
    import gradio

    def guarded(function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def choose(name: str) -> tuple[Any, Any]:
        """The control of the classes of a run, and that of sigma, which needs latents of real images."""
        opened = viewer.open(name)
        label = "caption" if isinstance(opened.generator, PipelineGenerator) else "class"
        # Custom values: any caption, and ``show`` says what is wrong with a class.
        classes = gradio.Dropdown(opened.names, value=opened.names[0], label=label, allow_custom_value=True, scale=2)
        about = "sigma: share of a real image's latents; 0 is a sample"
        about += "" if opened.real else " (no latents of real images here)"
        return classes, gradio.Slider(0, 1, 0, step=0.05, label=about, interactive=opened.real is not None)

    def show(*values: Any) -> tuple[Any, np.ndarray, str]:
        view = viewer.show(*values)
        return (view.before, view.after), view.difference, view.words

    names = list(viewer.found.post_trained)
    try:  # the first picture is there when the page opens
        label, sigma = choose(names[0])
        first = show(names[0], label.value, 0, 0, 1)
    except UserError as error:
        label, sigma = (
            gradio.Dropdown([], label="class", allow_custom_value=True, scale=2),
            gradio.Slider(0, 1, 0, label="sigma"),
        )
        first = None, None, str(error)
    with gradio.Blocks(title="robustok", analytics_enabled=False) as page:
        gradio.Markdown("## The same latents, decoded before and after post-training")
        with gradio.Row():
            run = gradio.Dropdown(names, value=names[0], label="run", scale=3)
            label.render()
            seed = gradio.Number(0, label="seed", precision=0, minimum=0)
        with gradio.Row():
            sigma.render()
            strength = gradio.Slider(0, 1.5, 1, step=0.05, label="strength: 0 untouched, 1 post-trained")
        with gradio.Row():
            pair = gradio.ImageSlider(
                first[0], label="untouched | post-trained", format="png", max_height=SCREEN, interactive=False, scale=2
            )
            difference = gradio.Image(
                first[1], label="difference", format="png", interactive=False, buttons=["fullscreen"]
            )
        words = gradio.Markdown(first[2])
        inputs, outputs = [run, label, seed, sigma, strength], [pair, difference, words]
        update = {"fn": partial(guarded, show), "inputs": inputs, "outputs": outputs, "show_progress": "hidden"}
        run.change(partial(guarded, choose), [run], [label, sigma], api_name="choose").then(**update, api_name="show")
        for control in (label, seed, sigma, strength):  # as they are moved; what was asked in between is left out
            control.input(**update, trigger_mode="always_last", api_visibility="private")
    return page
