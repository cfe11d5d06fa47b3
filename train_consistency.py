"""Tune a trained denoiser into a consistency model, which makes images by one or two evaluations."""

from training.config.consistency import CONSISTENCY_PRESETS, ConsistencyTraining
from training.launch import training_command

HELP = """Tune the network of a snapshot into a consistency model, which makes images by one or two evaluations
(generate_images.py --sampler=consistency).

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

\b
Example:
  # Handwritten digits, on any laptop
  python train_edm2.py --outdir=out/digits --data=datasets/digits.zip --preset=digits
  python train_consistency.py --outdir=out/ect --data=datasets/digits.zip --preset=digits-ect \\
      --init-from=out/digits
"""

main = training_command(ConsistencyTraining, CONSISTENCY_PRESETS, "digits-ect", HELP)

if __name__ == "__main__":
    main()
