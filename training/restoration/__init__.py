"""Inverse problems: what is known of an image is a linear function of it with noise, and a denoiser finds the rest."""
