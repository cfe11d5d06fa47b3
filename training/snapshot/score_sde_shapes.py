"""The architecture of a published score-SDE network from the names and shapes of its weights.

They say the sizes, and in the buffer `sigmas` the noise levels. What they do not say (the SDE, how pyramids are
combined, the resolution) comes from a preset.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dnnlib.errors import UserError, one_line
from training.conditioning import DataSpec
from training.config.score_sde import ScoreNetwork
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.training import Preset
from training.networks.score_sde import ScoreSDE

State = Mapping[str, torch.Tensor]


class Architecture(NamedTuple):
    """What a file's network is."""

    network: ScoreNetwork
    channels: int
    resolution: int
    like: str  # the preset that says what shapes do not
    is_preset: bool  # whether it is the preset's own network


def architecture_for(state: State, preset: str | None) -> Architecture:
    """The architecture whose weights these are, if they are of a preset's kind.

    Args:
        preset: name of the preset; None = the only one that fits.

    Raises:
        UserError: no such preset, weights of another kind than its, or several presets that fit.
    """
    if preset is not None:
        if preset not in SCORE_PRESETS:
            raise UserError(f"{preset!r} is no preset of train_score_sde.py (see its --list-presets)")
        found = _sized(state, preset)
        differing = first_difference(state, found)
        if differing is not None:
            raise UserError(f"its weights are not those of preset {preset}: the first differing key is {differing}")
        return found
    fitting: dict[ScoreNetwork, str] = {}
    for name in SCORE_PRESETS:
        try:
            found = _sized(state, name)
            fits = found.is_preset and first_difference(state, found) is None
        except UserError:
            continue
        if fits:
            fitting.setdefault(found.network, name)
    if len(fitting) == 1:
        return _sized(state, next(iter(fitting.values())))
    if not fitting:
        raise UserError("its weights are of no preset's size: name the preset that it is most like with --arch")
    raise UserError(f"its weights fit {', '.join(fitting.values())}: name the one with --arch")


def first_difference(state: State, found: Architecture) -> str | None:
    """The first key in which weights are not those of an architecture, and how; None = there is none.

    Raises:
        UserError: there is no such network.
    """
    try:
        data = DataSpec(channels=found.channels, resolution=found.resolution)
        with torch.device("meta"):
            wanted = ScoreSDE(data, **found.network.to_json()).net.state_dict()
    except UserError as err:
        raise _misfit(found.like, err) from None
    for key, tensor in wanted.items():
        if key not in state:
            return f"{key}, which is missing"
        if state[key].shape != tensor.shape:
            return f"{key}, of shape {list(state[key].shape)} instead of {list(tensor.shape)}"
    return next((f"{one_line(key)[:50]}, which is not part of it" for key in state if key not in wanted), None)


def _sized(state: State, name: str) -> Architecture:
    """The architecture of a preset's kind, of the file's sizes.

    Raises:
        UserError: the weights are of another kind.
    """
    preset = SCORE_PRESETS[name]
    base = preset.config.network
    refine = base.model in ("ncsn", "ncsnv2")
    first = {"begin_conv.weight"} if refine else {"all_modules.0.W", "all_modules.0.weight"}
    if first.isdisjoint(state):
        raise UserError(f"its weights are not those of preset {name}: the first differing key is {next(iter(state))}")
    sizes, channels = _refine_sizes(state, base) if refine else _unet_sizes(state, preset)
    if "sigmas" in state and len(state["sigmas"]) > 1:
        high, low = (float(f"{state['sigmas'][i].item():.9g}") for i in (0, -1))
        sizes |= {"sigma_max": high, "sigma_min": low, "num_scales": len(state["sigmas"])}
    try:
        network = dataclasses.replace(base, **sizes)
    except UserError as err:
        raise _misfit(name, err) from None
    return Architecture(network, channels, preset.resolution, name, network == base and channels == preset.channels)


def _misfit(preset: str, err: UserError) -> UserError:
    return UserError(f"its weights make no network like that of preset {preset}: {one_line(err)}")


def _refine_sizes(state: State, base: ScoreNetwork) -> tuple[dict[str, Any], int]:
    """Sizes of NCSN and NCSNv2, and the number of image channels."""
    first = state["begin_conv.weight"]
    plan = 256 if "res31.0.conv1.weight" in state else 128 if "res5.0.conv1.weight" in state else 64
    sizes: dict[str, Any] = {"nf": first.shape[0], "plan": plan}
    if base.model == "ncsn" and "normalizer.embed.weight" in state:
        sizes["num_scales"] = len(state["normalizer.embed.weight"])
    return sizes, first.shape[1]


def _unet_sizes(state: State, preset: Preset) -> tuple[dict[str, Any], int]:
    """Sizes of NCSN++, DDPM++ and DDPM, and the number of image channels, from the way down."""
    modules = _modules(state)
    position = next((i for i, module in enumerate(modules) if _ndim(module) == 4), None)
    if position is None:
        raise UserError("its weights are not those of a score-SDE network: there is no first convolution")
    nf, channels = modules[position]["weight"].shape[:2]
    widths: list[int] = []
    attends: list[bool] = []
    blocks = 0  # of the level
    num_blocks = None  # of all levels
    for module in modules[position + 1 :]:
        if "Conv_1.weight" in module:
            out, into = module["Conv_0.weight"].shape[:2]
            if "Conv_2.weight" in module and out == into:  # it halves the resolution
                num_blocks, blocks = num_blocks or blocks, 0
                continue
            if blocks == num_blocks:  # the first of the middle
                break
            if blocks == 0:
                widths.append(out)
                attends.append(False)
            blocks += 1
        elif "NIN_3.W" in module:
            if blocks == 0:
                break
            attends[-1] = True
        elif blocks > 0 and _is_resampling(module, preset):
            num_blocks, blocks = num_blocks or blocks, 0
    levels = range(len(widths))
    sizes = {
        "nf": nf,
        "ch_mult": tuple(max(width // nf, 1) for width in widths),
        "num_res_blocks": num_blocks or max(blocks - 2, 1),
        "conditional": any(_ndim(module) == 2 for module in modules[:position]),
    }
    found = {level for level in levels if attends[level]}
    wanted = preset.config.network.attn_resolutions
    if found != {level for level in levels if preset.resolution >> level in wanted}:
        sizes["attn_resolutions"] = tuple(preset.resolution >> level for level in sorted(found))
    return sizes, channels


def _is_resampling(module: State, preset: Preset) -> bool:
    """Whether a module is what halves the resolution between the blocks of DDPM."""
    between = preset.config.network.model == "ddpm" or preset.config.network.resblock_type == "ddpm"
    return between and not {"Conv_0.weight", "Conv2d_0.weight"}.isdisjoint(module)


def _modules(state: State) -> list[dict[str, torch.Tensor]]:
    """The numbered modules' own names and tensors."""
    modules: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", key)
        if match is not None:
            modules.setdefault(int(match[1]), {})[match[2]] = tensor
    return [modules[i] for i in sorted(modules)]


def _ndim(module: State) -> int:
    return module["weight"].ndim if "weight" in module else 0
