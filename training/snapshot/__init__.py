"""Network snapshots: native safetensors files, published pickles, Hugging Face folders; here or at a URL.

`python snapshot_tool.py` converts, inspects, exports and fetches them.
"""

from training.encoders import NVAEEncoder
from training.snapshot.files import (
    Snapshot,
    load_network,
    open_snapshot,
    read_metadata,
    save_network,
    write_snapshot,
)
from training.snapshot.layout import SnapshotFile, build_for
from training.snapshot.nvae_latents import find_nvae_snapshot

NVAEEncoder.open_file = staticmethod(find_nvae_snapshot)

__all__ = [
    "Snapshot",
    "SnapshotFile",
    "build_for",
    "load_network",
    "open_snapshot",
    "read_metadata",
    "save_network",
    "write_snapshot",
]
