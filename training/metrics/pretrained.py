"""Networks of the transformers library (optional) as detectors: their files, read and checked, and their resizing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import safetensors.torch
import torch
import torch.nn.functional as F

from dnnlib.errors import UserError, one_line
from training.metrics.weights import check_finite, check_fit


def file_of(folder: Path, names: tuple[str, ...], detector: str) -> Path:
    """The first of some files that a folder has.

    Args:
        detector: whose weights it holds, for the message.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder / names[0]}: no such file: the weights of {detector} are a folder with config.json and "
        f"model.safetensors"
    )


def read_settings(config: Path, model_type: str, title: str) -> dict[str, Any]:
    """The contents of a config.json.

    Args:
        model_type: that it must name.
        title: what it describes then, for the message.

    Raises:
        UserError: it is of another network, or damaged.
    """
    try:
        settings = json.loads(config.read_text())
        if type(settings) is not dict or settings.get("model_type") != model_type:
            raise ValueError(f"its model_type is not {model_type}")
    except (ValueError, RecursionError) as err:
        raise UserError(f"{config}: not the config.json of a {title} ({one_line(err)})") from None
    return settings


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as err:
        raise UserError(f"{path}: damaged or truncated ({one_line(err)}): copy it again") from None


def build(
    cls: Any,
    make_config: Callable[[], Any],
    state: Mapping[str, torch.Tensor],
    config: Path,
    tensors: Path,
    title: str,
) -> Any:
    """A network of transformers with all of its weights, float32, in evaluation mode.

    Args:
        cls: its class.
        make_config: makes its configuration from what config.json says.
        state: weights by name.
        config, tensors: files that these are from, for messages.
        title: what the network is, for messages.

    Raises:
        UserError: the configuration describes no such network, or the weights are of another one or not finite.
    """
    from transformers.utils import logging

    # transformers would warn of what does not fit; that is checked below.
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        net, found = cls.from_pretrained(
            None,
            config=make_config(),
            state_dict=dict(state),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as err:  # wrong values raise all kinds of errors
        raise UserError(f"{config}: does not describe a {title} ({one_line(err)})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    wrong = [f"{name} has another shape" for name, *_ in found["mismatched_keys"]]
    check_fit(tensors, found["missing_keys"], found["unexpected_keys"], wrong)
    check_finite(tensors, net)
    return net.eval().requires_grad_(False).float()


def resize_bicubic(images: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Images [N, 3, size, size] by bicubic interpolation with antialiasing, float32, both from 0 to 255.

    Args:
        images: uint8 [N, 3, H, W].
        mode: 'torch' = in float32; 'pil' = by Pillow, which rounds to integers.
    """
    if mode == "pil":
        out = np.empty([len(images), size, size, 3], dtype=np.uint8)
        for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            picture = PIL.Image.fromarray(np.ascontiguousarray(image))
            out[i] = np.asarray(picture.resize((size, size), PIL.Image.Resampling.BICUBIC))
        return torch.from_numpy(out).permute(0, 3, 1, 2).to(images.device).float()
    x = images.float()
    if x.device.type == "mps":
        x = x.cpu()  # torch 2.6 has no antialiased interpolation on MPS
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).to(images.device)
