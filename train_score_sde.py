"""Train a score-SDE model."""

from training.config.score_sde import ScoreTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.launch import training_command

HELP = """Train a score-SDE model (VE, VP or sub-VP) on a folder or ZIP file of images.

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

\b
Examples:
  # Handwritten digits, on any laptop
  python train_score_sde.py --outdir=out/vp --data=datasets/digits.zip --preset=digits-vp
  # NCSN++ on CIFAR-10 with 8 GPUs
  torchrun --standalone --nproc_per_node=8 train_score_sde.py \\
      --outdir=training-runs/ve --data=datasets/cifar10.zip --preset=ve/cifar10_ncsnpp_continuous
"""

main = training_command(ScoreTraining, SCORE_PRESETS, "ve/cifar10_ncsnpp_continuous", HELP)

if __name__ == "__main__":
    main()
