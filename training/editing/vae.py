"""What the latents of an NVAE can be used for: reconstructions, interpolations, and groups one at a time.

Latents are those that `NVAE.sample` draws, (z - mu) / sigma of each prior, so that groups can be exchanged: a group
keeps its meaning relative to the ones above it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from dnnlib.util import code_version
from torch_utils import pictures
from torch_utils.device import select_device, set_up_device
from training.dataset.images import ImageFolderDataset
from training.editing.images import between, check_images
from training.encoders import StandardRGBEncoder
from training.guides import load_image_network
from training.networks.nvae import NVAE
from training.samplers import StackedRandomGenerator
from training.snapshot.nvae_latents import NVAELatents

Latents = list[torch.Tensor]  # of each group [N, Z, H, W], the top group first


@dataclass(frozen=True)
class Sheet:
    """Pictures in rows, each with a caption.

    Args:
        images: uint8 [N, C, H, W].
        columns: of the rows.
        captions: one per image.
    """

    images: np.ndarray
    columns: int
    captions: list[str]


class Editor:
    """An NVAE, and what it does with images.

    Args:
        net: a snapshot file or URL.
        device: where to compute, as --device takes it.
        arch: training preset that names the architecture of published files that do not say it.

    Raises:
        UserError: the file holds another network.
    """

    def __init__(self, net: str, device: str = "auto", arch: str | None = None):
        self.device = select_device(device)
        set_up_device(self.device)
        self.snapshot = load_image_network(net, self.device, arch)
        self.source, found = net, self.snapshot.net
        if not isinstance(found, NVAE):
            raise UserError(f"--net={net}: holds a {type(found).__name__}, and this needs the latents of an NVAE")
        self.net, self.latents = found, NVAELatents(found)

    def describe(self) -> dict[str, Any]:
        """What edits images, as plain JSON values."""
        return {"net": self.source, "net_sha256": file_sha256(self.snapshot.path), "code_version": code_version()}

    def images_of(self, data: str, indices: Sequence[int]) -> torch.Tensor:
        """Images of a dataset, uint8 [N, C, H, W].

        Raises:
            UserError: they are not such as the network was trained on, or an index is too large.
        """
        dataset, spec = ImageFolderDataset(data, use_labels=False), self.net.spec
        check_images(dataset, data, indices, spec, spec.channels)
        return torch.from_numpy(np.stack([dataset[i][0] for i in indices])).to(self.device)

    def encode(self, images: torch.Tensor, seeds: Sequence[int] | None = None) -> Latents:
        """Latents of images, uint8 [N, C, H, W].

        Args:
            seeds: of draws from the posteriors, one per image; None = their means.
        """
        rnd = StackedRandomGenerator(self.device, range(len(images)) if seeds is None else seeds)
        return self.latents.draws_of(images, rnd.randn_like, torch.zeros_like if seeds is None else rnd.randn_like)

    def decode(self, latents: Latents) -> np.ndarray:
        """Mean images of latents, uint8 [N, C, H, W]."""
        return StandardRGBEncoder().decode(2 * self.latents.images_of(latents) - 1).cpu().numpy()

    def draw(self, seeds: Sequence[int], temperature: float = 1) -> Latents:
        """Latents of random images, one per seed, those of `generate_images.py`."""
        noise = StackedRandomGenerator(self.device, seeds).randn([len(seeds), self.net.noise_size])
        return self.net.split_noise(noise * temperature)

    def interpolate(self, latents: Latents, frames: int) -> torch.Tensor:
        """Pictures from each image to the next on great circles of the latents, uint8 [N - 1, frames, C, H, W]."""
        rows = []
        for i in range(len(latents[0]) - 1):
            for k in range(frames):
                t = k / (frames - 1)
                rows.append(self.decode([between(z[i : i + 1], z[i + 1 : i + 2], t) for z in latents]))
        pictures = torch.from_numpy(np.concatenate(rows))
        return pictures.reshape(-1, frames, *pictures.shape[1:])

    def name_of_group(self, i: int) -> str:
        """'g03 8x8' of group 3, whose latents are 8x8."""
        _, height, width = self.net.latent_shapes[i]
        return f"g{i:02d} {height}x{width}"


def reconstruct(
    editor: Editor, images: torch.Tensor, keep: Sequence[int] | None = None, temperature: float = 1
) -> tuple[np.ndarray, Sheet]:
    """Reconstructions of images, uint8 [N, C, H, W], and a sheet: a row of the images, and one for each of `keep`.

    Args:
        images: uint8 [N, C, H, W].
        keep: so many groups, from the top, come from the images, the others from the prior; None = all.
        temperature: of what comes from the prior.

    Raises:
        UserError: a network of fewer groups.
    """
    groups = editor.net.num_groups
    keep = [groups] if keep is None else keep
    if not all(0 <= k <= groups for k in keep):
        raise UserError(f"--keep={','.join(map(str, keep))}: the network has {groups} groups")
    latents, others = editor.encode(images), editor.draw(range(len(images)), temperature)
    rows = [editor.decode([*latents[:k], *others[k:]]) for k in keep]
    shown = [images.cpu().numpy(), *rows]
    captions = [text for text in ["image", *(f"top {k}" for k in keep)] for _ in images]
    whole = rows[list(keep).index(groups)] if groups in keep else editor.decode(latents)
    return whole, Sheet(np.concatenate(shown), len(images), captions)


def traverse(editor: Editor, latents: Latents, group: int, columns: int, temperature: float = 1) -> Sheet:
    """A row for each of N latents: its picture, and others in which one group is drawn again.

    Args:
        group: index of the group that changes; the groups below it keep their draws.
        columns: pictures in a row, the unchanged one among them.
        temperature: of the draws.
    """
    count = len(latents[0])
    rows = [editor.decode(latents)]
    for k in range(1, columns):
        fresh = editor.draw([count * k + i for i in range(count)], temperature)[group]
        rows.append(editor.decode([fresh if i == group else z for i, z in enumerate(latents)]))
    images = np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])
    captions = ["as it is", *[editor.name_of_group(group)] * (columns - 1)] * count
    return Sheet(images, columns, captions)


def save_sheet(path: Path, sheet: Sheet) -> None:
    """Write a sheet as PNG.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pictures.drawable(torch.from_numpy(sheet.images))
    pictures.save_image(path, pictures.image_grid(images, sheet.columns, sheet.captions))
