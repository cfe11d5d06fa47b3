"""Train a U-ViT model."""

from training.config.uvit import UViTTraining
from training.config.uvit_presets import UVIT_PRESETS
from training.launch import training_command

HELP = """Train a U-ViT on a folder or ZIP file of images or latents, with classes, captions or neither.

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

\b
Examples:
  # Handwritten digits by class, on any laptop
  python train_uvit.py --outdir=out/uvit --data=datasets/digits.zip --preset=digits-uvit
  # U-ViT-H/2 on ImageNet latents with 8 GPUs
  torchrun --standalone --nproc_per_node=8 train_uvit.py \\
      --outdir=training-runs/uvit --data=datasets/img256-sd.zip --preset=imagenet256_uvit_huge
"""

main = training_command(UViTTraining, UVIT_PRESETS, "imagenet256_uvit_huge", HELP)

if __name__ == "__main__":
    main()
