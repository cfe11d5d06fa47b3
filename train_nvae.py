"""Train an NVAE."""

from training.config.nvae import TRAINING_PRESETS, NVAETraining, presets_table
from training.launch import training_command

HELP = f"""Train an NVAE, a deep hierarchical variational autoencoder, on a folder or ZIP file of images.

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024). Learning
rate and weight of the KL term follow the duration, so a run should be begun with the one that it is to have.

\b
Examples:
  # Handwritten digits, on any laptop
  python train_nvae.py --outdir=out/digits-nvae --data=datasets/digits.zip --preset=digits-nvae
  # CIFAR-10 with 8 GPUs
  torchrun --standalone --nproc_per_node=8 train_nvae.py \\
      --outdir=training-runs/nvae-cifar10 --data=datasets/cifar10.zip --preset=nvae-cifar10

\b
Presets, with their published results:
{presets_table()}
"""

main = training_command(NVAETraining, TRAINING_PRESETS, "digits-nvae", HELP)

if __name__ == "__main__":
    main()
