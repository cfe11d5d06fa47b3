"""Train an EDM2 diffusion model."""

from typing import TYPE_CHECKING

from dnnlib.cli import imported_when_used, parse_nimg
from training.config.edm2 import TRAINING_PRESETS, EDM2Training
from training.launch import training_command

if TYPE_CHECKING:
    from training.release import launch_training, setup_training_config
    from training.release import training_presets as config_presets

__all__ = ["config_presets", "launch_training", "parse_nimg", "setup_training_config"]  # for Python callers
__getattr__ = imported_when_used(
    {
        "config_presets": "training.release:training_presets",
        **dict.fromkeys(["launch_training", "setup_training_config"], "training.release"),
    }
)

HELP = """Train an EDM2 model on a folder or ZIP file of images.

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

\b
Examples:
  # A class-conditional model of handwritten digits, on any laptop
  python train_edm2.py --outdir=out/digits --data=datasets/digits.zip --preset=digits
  # EDM2-S on ImageNet latents with 8 GPUs
  torchrun --standalone --nproc_per_node=8 train_edm2.py \\
      --outdir=training-runs/img512-s --data=datasets/img512-sd.zip --preset=edm2-img512-s --batch-gpu=32
"""

main = training_command(EDM2Training, TRAINING_PRESETS, "edm2-img512-s", HELP)

if __name__ == "__main__":
    main()
