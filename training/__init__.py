"""Networks, objectives, samplers, data and the training loop."""
