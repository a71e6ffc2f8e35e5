"""Loading pipelines of the diffusers library in parts, and calling them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from robustok.backbones import diffusers_network, silent_diffusers
from robustok.errors import UserError
from robustok.files import one_line, read_json
from robustok.generators.pipeline_families import UNUSED, PipelineFamily, parts_of


def empty_autoencoder(folder: Path, encode: Callable[[Tensor], SimpleNamespace]) -> nn.Module:
    """The autoencoder of a pipeline with its class and settings but no weights, for one that is given latents.

    Args:
        folder: of the pipeline.
        encode: called in the place of encoding an image (1, 3, H, W); returns its latents as ``latents``.
    """
    settings = read_json(folder / "vae" / "config.json")
    with torch.device("meta"):  # without memory
        vae = diffusers_network(str(settings.get("_class_name")), {k: v for k, v in settings.items() if k[0] != "_"})
    for name, _ in list(vae.named_children()):
        setattr(vae, name, None)
    vae.empty = nn.Parameter(torch.zeros(0), requires_grad=False)  # the library asks for its device and type
    vae.encode = encode
    return vae


def load_parts(
    folder: Path,
    family: PipelineFamily,
    vae: nn.Module,
    texts: bool,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
) -> Any:
    """The image-to-image pipeline of a folder, or text-to-image without one, with text encoders or with its denoiser.

    Args:
        folder: of the pipeline.
        family: of the pipeline.
        vae: in the place of its autoencoder.
        texts: whether it has text encoders and no denoiser.
        dtype: of the weights.
        device: of the weights.
        offload: whether each part is on the device only while it runs.

    Raises:
        UserError: diffusers or transformers cannot load it.
    """
    import diffusers

    loader = getattr(diffusers, family.image or family.text)
    accepted = inspect.signature(loader.__init__).parameters
    text = [part for part in accepted if part.startswith(("text_encoder", "tokenizer"))]
    if texts and not set(text) & set(parts_of(read_json(folder / "model_index.json"))):
        raise UserError(f"{folder} has no text encoder; give the whole pipeline")
    left_out = [*([family.denoiser] if texts else text), *UNUSED]
    given = {part: None for part in left_out if part in accepted} | {"vae": vae}
    options = {"requires_safety_checker": False} if "safety_checker" in given else {}
    try:
        with silent_diffusers():
            pipe = loader.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, **given, **options
            )
    except Exception as error:  # of many types, all of which the user can act on
        reason = f"cannot be loaded as {loader.__name__} ({one_line(error, 300)})"
        raise UserError(f"{folder} {reason}; copy it again, with weights as safetensors") from None
    _make_quiet(pipe)
    # The empty autoencoder too: the device of a pipeline is that of its first part.
    for value in pipe.components.values():
        if isinstance(value, nn.Module):
            value.requires_grad_(False).eval().to("cpu" if offload else device)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    return pipe


def text_to_image(pipe: Any, family: PipelineFamily) -> Any:
    """The text-to-image pipeline with the parts of an image-to-image one, or the pipeline itself if that is none."""
    import diffusers

    if family.image is None:
        return pipe

    loader = getattr(diffusers, family.text)
    accepted = inspect.signature(loader.__init__).parameters
    options = {"requires_safety_checker": False} if "safety_checker" in accepted else {}
    with silent_diffusers():
        twin = loader(**{key: value for key, value in pipe.components.items() if key in accepted}, **options)
    if getattr(pipe, "_all_hooks", None):
        twin.enable_model_cpu_offload(device=pipe._offload_device)
    return _make_quiet(twin)


def _make_quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = None  # of SDXL, which would change latents
    return pipe


def call(pipe: Any, given: Mapping[str, Any]) -> Any:
    """Call a pipeline. Prompts and sizes that it does not take are left out.

    Raises:
        UserError: it refuses the arguments.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    ours = {"height", "width", "use_resolution_binning"} | {key for key in given if "prompt" in key}
    if unknown := [key for key in given if key not in accepted and key not in ours]:
        raise UserError(f"{type(pipe).__name__} has no argument {unknown[0]}; drop it from sampling.arguments")
    try:
        with silent_diffusers():
            return pipe(**{key: value for key, value in given.items() if key in accepted})
    except ValueError as error:
        raise UserError(f"{type(pipe).__name__} refuses this ({one_line(error, 300)}); change sampling") from None


def default_of(pipe: Any, argument: str) -> Any:
    """The pipeline's own value of an argument of its call; None where it does not take it."""
    found = inspect.signature(pipe.__call__).parameters.get(argument)
    return None if found is None else found.default


@contextmanager
def other_scheduler(pipe: Any, name: str | None) -> Iterator[None]:
    """Context in which a pipeline has another scheduler, with the settings of its own; None leaves it.

    Raises:
        UserError: diffusers has no such class, or it does not take these settings.
    """
    if name is None:
        yield
        return
    import diffusers

    own, family = pipe.scheduler, getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or not hasattr(family, "from_config"):
        raise UserError(f"sampling.scheduler={name}: diffusers has no such scheduler; give one such as DDIMScheduler")
    try:
        with silent_diffusers():
            pipe.scheduler = family.from_config(own.config)
    except Exception as error:  # of many types
        reason = one_line(error, 200)
        raise UserError(
            f"sampling.scheduler={name} does not take the pipeline's settings ({reason}); drop it"
        ) from None
    try:
        yield
    finally:
        pipe.scheduler = own
