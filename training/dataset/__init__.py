"""Images and latents in folders and ZIP files."""

from training.dataset.images import ImageFolderDataset

__all__ = ["ImageFolderDataset"]
