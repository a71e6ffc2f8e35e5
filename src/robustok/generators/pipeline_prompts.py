"""Prompts of a pipeline as arguments of its call: encoded one by one, stacked to batches."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustok.backbones import silent_diffusers
from robustok.generators.pipeline_families import PipelineFamily
from robustok.generators.pipeline_loading import default_of

NEGATIVE = "negative"  # the name of what guidance moves away from, among the digests of prompts
Condition = dict[str, Tensor]
"""Arguments of a pipeline's call for one prompt, without the dimension of the batch."""


def encode(pipe: Any, family: PipelineFamily, text: str | None, device: torch.device) -> Condition:
    """A prompt as arguments of a call, or what guidance moves away from, for None.

    Args:
        pipe: with its text encoders.
        family: of the pipeline.
        text: the prompt.
        device: of the text encoders.
    """
    given = {"prompt": [text or ""], "prompt_2": None, "prompt_3": None, "device": device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if text is None and family.negative:
        given["prompt"] = [family.negative]
    given["complex_human_instruction"] = default_of(pipe, "complex_human_instruction")  # of Sana
    accepted = inspect.signature(pipe.encode_prompt).parameters
    with silent_diffusers():  # it would print what it cuts off
        found = pipe.encode_prompt(**{key: value for key, value in given.items() if key in accepted})
    named = {key: value for key, value in zip(family.encoded, found, strict=True) if key}
    embedding = named["prompt_embeds"][0]  # (tokens, width)
    if "prompt_embeds_mask" in named and named["prompt_embeds_mask"] is None:
        named["prompt_embeds_mask"] = embedding.new_ones(1, len(embedding), dtype=torch.int64)
    first = {key: value[0].cpu().contiguous() for key, value in named.items()}
    if text is None and not any(key.startswith(NEGATIVE) for key in first):
        return {f"{NEGATIVE}_{key}": value for key, value in first.items()}
    return {key: value for key, value in first.items() if key.startswith(NEGATIVE) is (text is None)}


def stacked(
    conditions: Sequence[Condition], family: PipelineFamily, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Conditions as a batch: padded to the longest, or lists where the family takes lists."""
    batch: dict[str, Any] = {}
    for key in conditions[0]:
        each = [condition[key].to(device) for condition in conditions]
        each = [value.to(dtype) if value.is_floating_point() else value for value in each]
        batch[key] = each if family.lists else nn.utils.rnn.pad_sequence(each, batch_first=True)  # (N, tokens, width)
    return batch


def no_prompt(family: PipelineFamily, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of a call that never reaches the denoiser: a prompt of zeros, no guidance."""
    zeros, ones = (torch.full((1, 2, 8), value, device=device, dtype=dtype) for value in (0.0, 1.0))
    names = [key for key in family.encoded if key and not key.startswith(NEGATIVE)]
    given = {key: ones[..., 0] if "mask" in key else zeros[:, 0] if "pooled" in key else zeros for key in names}
    given = {key: list(value) for key, value in given.items()} if family.lists else given
    return given | {family.guidance: family.unguided}
