"""The images that are measured: folders, ZIP files, and .npz files of ADM."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import file_sha256
from dnnlib.util import EasyDict
from torch_utils import distributed
from training.dataset.decoding import Transform
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.dataset.order import begin_loader_process, collate, start_loading, subset


class ArrayImages(torch.utils.data.Dataset):
    """Images of an .npz file as ADM writes it, `arr_0`: uint8 [N, H, W, C].

    Args:
        max_size: use a subset of at most so many images, drawn by `seed`; None = use all.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """

    def __init__(self, path: Path, max_size: int | None, seed: int):
        self.path = path
        try:
            with open(path, "rb") as f, np.load(f, allow_pickle=False) as archive:
                self.array = archive["arr_0"]
        except Exception as err:  # damaged files raise all kinds of errors, from zipfile, its decompressors and NumPy
            reason = "it has no arr_0" if isinstance(err, KeyError) else one_line(err)
            raise UserError(f"{path}: holds no images ({reason})") from None
        if self.array.dtype != np.uint8 or self.array.ndim != 4:
            raise UserError(f"{path}: arr_0 is {self.array.dtype} {list(self.array.shape)}, not uint8 [N, H, W, C]")
        if self.array.shape[1] != self.array.shape[2]:
            raise UserError(f"{path}: images of {self.array.shape[1]}x{self.array.shape[2]}, which are not square")
        self.resolution = self.array.shape[1]
        self.indices = subset(len(self.array), max_size, seed)

    def summary(self) -> list[str]:
        """What the file contains, in lines for users."""
        return [f"{self.path}: {many(len(self), 'image')}, pixels of {self.resolution}x{self.resolution}; labels: none"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        """An image [C, H, W], and no label."""
        return self.array[self.indices[idx]].transpose(2, 0, 1), np.zeros([0], dtype=np.float32)


StoredImages = ImageFolderDataset | ArrayImages


def open_images(
    path: str | Path,
    num_images: int | None = None,
    seed: int = 0,
    fit: Transform | None = None,
    classes: bool = False,
) -> StoredImages:
    """The uint8 images of a folder, a ZIP file, or an .npz file of ADM; transparent ones on white, as converted.

    Args:
        num_images: how many; of more, `seed` draws a subset. None = all.
        fit: makes images of one size of those in folders and ZIP files, see `ImageFolderDataset`; None = they are.
        classes: look up the classes of the images, too.

    Raises:
        UserError: the path is missing or damaged, holds latents or fewer images, they differ in size, or have no
            classes.
    """
    path = Path(path)
    if path.suffix == ".npz":
        images = ArrayImages(path, num_images, seed)
    else:
        images = ImageFolderDataset(
            path, use_labels=classes, max_size=num_images, random_seed=seed, opaque=True, fit=fit
        )
        if images.dtype != np.uint8:
            raise UserError(f"{path}: holds latents, not images: decode them first (dataset_tool.py decode)")
        images.verify()
    if num_images is not None and len(images) < num_images:
        raise UserError(
            f"{path}: holds {len(images)} images, fewer than --num={num_images}: generate more, or lower --num"
        )
    if classes and not has_classes(images):
        raise UserError(f"{path}: says no classes of its images, which balance needs: label them, or leave it out")
    return images


def has_classes(images: StoredImages) -> bool:
    """Whether each image is of a class."""
    return isinstance(images, ImageFolderDataset) and images.has_labels and isinstance(images.get_stored_label(0), int)


def content_hash(images: StoredImages) -> str:
    """What identifies the images: of a folder or ZIP file as in `DatasetInfo`, of an .npz file its SHA-256."""
    return file_sha256(images.path) if isinstance(images, ArrayImages) else images.info().content_hash


class FileBatches:
    """This process's share of stored images, in batches.

    Batches are records of `images` and `indices`, and of `classes`, int64 [N], where the images were opened with them.

    Args:
        images: of `open_images`.
        max_batch_size: images at a time.
        num_workers: processes that load images.
        prefetch_factor: batches that each worker loads ahead.
    """

    def __init__(self, images: StoredImages, max_batch_size: int = 64, num_workers: int = 2, prefetch_factor: int = 2):
        if isinstance(images, ArrayImages):
            num_workers = 0  # they are in memory
        self.num_images, self.with_classes = len(images), has_classes(images)
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        batches = [range(i, min(i + max_batch_size, len(images))) for i in range(0, len(images), max_batch_size)]
        self.batches = batches[rank::world_size]
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=self.batches,  # type: ignore[arg-type]
            collate_fn=collate,
            worker_init_fn=begin_loader_process,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            multiprocessing_context="spawn" if num_workers > 0 else None,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[EasyDict]:
        batches = zip(self.batches, start_loading(self.loader), strict=True)
        for batch_idx, (indices, (images, labels)) in enumerate(batches):
            r = EasyDict(images=images, indices=np.array(indices), batch_idx=batch_idx, num_batches=len(self))
            if self.with_classes:
                r.classes = labels.argmax(dim=1)
            yield r
