"""Train a classifier of noisy images."""

from training.config.classifier import CLASSIFIER_PRESETS, ClassifierTraining
from training.launch import training_command

HELP = """Train a classifier of noisy images, which asks denoisers that know no classes for one (--classifier of
generate_images.py).

Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

\b
Examples:
  # Handwritten digits, for VP and sub-VP models, and for VE models
  python train_classifier.py --outdir=out/digits-classifier --data=datasets/digits.zip --preset=digits-classifier
  python train_classifier.py --outdir=out/digits-classifier-ve --data=datasets/digits.zip \\
      --preset=digits-classifier-ve
  # A wide residual network for the VE models of CIFAR-10, with 8 GPUs
  torchrun --standalone --nproc_per_node=8 train_classifier.py \\
      --outdir=training-runs/classifier --data=datasets/cifar10.zip --preset=cifar10-classifier-ve
"""

main = training_command(ClassifierTraining, CLASSIFIER_PRESETS, "cifar10-classifier-ve", HELP)

if __name__ == "__main__":
    main()
