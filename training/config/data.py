"""What identifies a dataset, and how images can be made square. Knows no tensors."""

from dataclasses import dataclass

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal")


@dataclass(frozen=True)
class DatasetInfo:
    """What identifies a dataset.

    `content_hash` is the SHA-256 of all names, sizes and labels and of the CRC-32 of up to 1024 evenly spaced images;
    a folder and a ZIP file of the same files agree.
    """

    count: int
    resolution: int
    channels: int
    label_dim: int
    content_hash: str
