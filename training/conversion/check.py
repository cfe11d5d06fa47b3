"""What a dataset contains, and whether training can use it."""

import contextlib
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from torch_utils.pictures import check_picture, drawable
from training.dataset.images import COMPRESSED, ImageFolderDataset
from training.dataset.listing import many
from training.dataset.order import evenly_spaced
from training.encoders import FINAL_STD, Encoder, StandardRGBEncoder, encoder_for

GRID_IMAGES, TILE = 64, 96  # of the contact sheet
LEVELS_DIVISOR = 8  # of the resolution: the networks of the presets halve it three times
SHOWN = 20  # names and classes that are listed one by one


def check_dataset(path: str, grid: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Facts about a dataset, and the reasons why training would fail on it.

    Args:
        grid: where to save a contact sheet; None = nowhere.

    Raises:
        UserError: there is no such dataset, or the contact sheet cannot be saved there.
    """
    if grid is not None:
        parent = next(folder for folder in grid.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"--grid={grid}: {parent} is not a folder that can be written to: choose another place")
        check_picture("--grid", grid, {"DATA": path})
    if not Path(path).exists():
        raise UserError(f"{path}: no such dataset")
    try:
        dataset = ImageFolderDataset(path)
    except UserError as err:
        return dict(path=path), [str(err)]
    scan = _scan(dataset)
    problems, notes = scan.problems[:], dataset.notes[:]
    encoder, final_channels, no_encoder = None, dataset.num_channels, ""
    try:
        encoder = encoder_for(dataset, log=lambda line: notes.append(line.removeprefix("Note: ")))
        final_channels = encoder.final_channels(dataset.num_channels)
    except UserError as err:
        no_encoder = str(err)
    facts: dict[str, Any] = dict(
        path=path,
        images=len(dataset),
        shapes=dict(scan.shapes),
        channels_seen_by_the_model=final_channels,
        label_dim=dataset.label_dim,
        mean=_rounded(scan.mean),
        std=_rounded(scan.std),
        duplicates=len(scan.duplicates),
        duplicate_examples=scan.duplicates[:SHOWN],
        unreadable=len(problems),
        notes=notes,
    )
    if dataset.compressed:
        facts["compressed"] = COMPRESSED
    if dataset.resolution % LEVELS_DIVISOR != 0:
        facts["resolution_note"] = (
            f"{dataset.resolution} is not divisible by {LEVELS_DIVISOR}, as networks of four levels (all presets but "
            "digits) need: convert with another --resolution, or train fewer levels (--channel-mult)"
        )
    facts.update(_labels(dataset, scan.readable))
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"and {len(problems) - SHOWN} more unreadable images"]
    constant = np.flatnonzero(scan.std[:final_channels] == 0).tolist()
    if constant and scan.readable:
        facts["constant_channels"] = constant
        if dataset.dtype != np.uint8:
            problems.append(f"{path}: channel {constant[0]} of the latents is constant")
    if no_encoder and not problems:
        problems.append(no_encoder)
    if encoder is not None and encoder.vae_name:
        facts["vae"] = encoder.vae_name
    if scan.readable and not problems and encoder is not None:
        facts.update(_noise(dataset, encoder, scan.readable))
    with contextlib.suppress(UserError):  # already among the problems
        facts["content_hash"] = dataset.info().content_hash
    if grid is not None and scan.readable:
        save_contact_sheet(grid, dataset, scan.readable)
    return facts, problems


@dataclass
class _Scan:
    """What reading all images of a dataset shows."""

    readable: list[int]  # indices
    problems: list[str]  # errors of the others
    shapes: Counter[str]
    duplicates: list[list[str]]  # pairs of names
    mean: np.ndarray  # per stored channel
    std: np.ndarray


def _scan(dataset: ImageFolderDataset) -> _Scan:
    readable, problems = [], []
    hashes: dict[bytes, str] = {}
    duplicates: list[list[str]] = []
    shapes: Counter[str] = Counter()
    moments = np.zeros([2, dataset.num_channels])
    for idx in Progress(range(len(dataset)), unit="img"):
        try:
            image, _label = dataset[idx]
        except UserError as err:
            problems.append(str(err))
            continue
        readable.append(idx)
        shapes["x".join(map(str, image.shape)) + f" {image.dtype}"] += 1
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        if digest in hashes:
            duplicates.append([hashes[digest], dataset.name(idx)])
        else:
            hashes[digest] = dataset.name(idx)
        values = image.astype(np.float64)
        moments += [values.mean(axis=(1, 2)), np.square(values).mean(axis=(1, 2))]
    mean, mean_square = moments / max(len(readable), 1)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return _Scan(readable, problems, shapes, duplicates, mean, std)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _labels(dataset: ImageFolderDataset, indices: list[int]) -> dict[str, Any]:
    if not dataset.has_labels:
        return dict(labels="none", label_source="")
    source = dict(label_source=dataset.label_source)
    stored = [dataset.get_stored_label(idx) for idx in indices]
    counts = Counter(label for label in stored if isinstance(label, int))
    if not counts:
        return dict(labels=f"vectors of length {dataset.label_dim}", **source)
    empty = [label for label in range(dataset.label_dim) if label not in counts]
    facts: dict[str, Any] = dict(
        labels=f"{many(len(counts), 'class')} of {min(counts.values())} to {max(counts.values())} images", **source
    )
    if dataset.class_names is not None:
        facts["class_names"] = dataset.class_names[: 5 * SHOWN]
    facts["label_histogram"] = {str(label): counts[label] for label in sorted(counts)[: 5 * SHOWN]}
    if empty:
        facts["classes_without_images"] = empty[:SHOWN]
    return facts


def _noise(dataset: ImageFolderDataset, encoder: Encoder, indices: list[int]) -> dict[str, Any]:
    """sigma_data of what the model sees, and the training noise that suits it.

    EDM2 trains 64x64 pixels (sigma_data 0.5) with P_mean = -0.8, P_std = 1.6 and latents with -0.4 and 1.0.
    Neighbouring pixels of larger images agree, so that the same noise hides less of them: the levels go up by
    ln(resolution / 64) (Hoogeboom et al., "simple diffusion", ICML 2023, Eq. 4).
    """
    chosen = [indices[i] for i in evenly_spaced(len(indices), 2000)]
    generator = torch.Generator().manual_seed(0)

    def randn_like(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator)

    channels = encoder.final_channels(dataset.num_channels)
    moments = torch.zeros(2, channels, dtype=torch.float64)  # mean and mean square per channel
    for idx in chosen:
        raw = torch.from_numpy(dataset[idx][0])[None]
        x = encoder.encode_latents(raw, randn_like).double()
        moments += torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))]) / len(chosen)
    mean, mean_square = moments
    sigma_data = math.sqrt(max((mean_square.mean() - mean.mean() ** 2).item(), 0))
    pixels = isinstance(encoder, StandardRGBEncoder)
    shift = math.log(sigma_data / FINAL_STD) if sigma_data > 0 else 0.0
    if pixels:
        larger = max(dataset.resolution / 64, 1.0)
        P_mean, P_std = -0.8 + shift + math.log(larger), 1.6
        reason = "EDM2's values for 64x64 pixels, shifted by ln(sigma_data / 0.5)"
        reason += f" and ln({larger:g}) for the resolution" if larger > 1 else ""
    else:
        P_mean, P_std = -0.4 + shift, 1.0
        reason = "EDM2's values for latents, shifted by ln(sigma_data / 0.5)"
    facts: dict[str, Any] = dict(
        sigma_data=round(sigma_data, 4), assumed_sigma_data=FINAL_STD, encoder=type(encoder).__name__
    )
    if not 0.5 < sigma_data / FINAL_STD < 2:
        facts["sigma_data_note"] = f"far from the {FINAL_STD} that the network assumes: check how the data was made"
    if not pixels:
        facts.update(_whitening(mean.numpy(), (mean_square - mean**2).clamp(min=0).sqrt().numpy()))
    return {**facts, "suggested_P_mean": round(P_mean, 2), "suggested_P_std": P_std, "suggestion_because": reason}


def _whitening(mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """A note on the channel of latents furthest from what the network assumes, which sigma_data can hide."""
    factor = np.abs(np.log2(np.maximum(std, 1e-9) / FINAL_STD))
    # Beyond 1: the standard deviation is off by more than a factor of two, or the mean by more than half of FINAL_STD.
    deviation = np.maximum(factor, np.abs(mean) / (FINAL_STD / 2))
    worst = int(deviation.argmax())
    if deviation[worst] <= 1:
        return {}
    note = (
        f"channel {worst} of the latents, as the model sees them, has mean {mean[worst]:.2f} and standard deviation "
        f"{std[worst]:.2f}, not 0 and {FINAL_STD}: check how the data was made"
    )
    return dict(channels_note=note)


def _label_text(dataset: ImageFolderDataset, idx: int) -> str:
    """The label of an item in a few characters: the name of its class where that is known."""
    label = dataset.get_stored_label(idx) if dataset.has_labels else ""
    if isinstance(label, list):
        return f"{label[:3]}..."
    return dataset.class_names[label] if isinstance(label, int) and dataset.class_names is not None else str(label)


def save_contact_sheet(path: Path, dataset: ImageFolderDataset, indices: list[int]) -> None:
    """Evenly spaced images of a dataset with their labels, as PNG."""
    chosen = [indices[i] for i in evenly_spaced(len(indices), GRID_IMAGES)]
    images = drawable(torch.from_numpy(np.stack([dataset[i][0] for i in chosen])))
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    line = 14
    sheet = PIL.Image.new("RGB", (columns * (TILE + 4), rows * (TILE + 4 + line)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for i, (idx, image) in enumerate(zip(chosen, images, strict=True)):
        x, y = i % columns * (TILE + 4), i // columns * (TILE + 4 + line)
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        tile = PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
        how = PIL.Image.Resampling.NEAREST if tile.width < TILE else PIL.Image.Resampling.LANCZOS
        sheet.paste(tile.resize((TILE, TILE), how), (x, y))
        text = _label_text(dataset, idx)
        draw.text((x + 2, y + TILE), f"{idx}: {text}" if text else str(idx), fill="black")
    with atomic_write(path) as f:
        sheet.save(f, format="png")
