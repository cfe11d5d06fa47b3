"""Families that can be trained on own images, and machines to do it on."""

TRAINED_FAMILIES = ("edm2", "score_sde", "uvit", "nvae")  # train_{family}.py
# How many images the networks that are meant for a machine want: fewer are soon learned by heart.
MACHINES = {"cpu": 0, "gpu": 10_000, "8gpus": 100_000}
