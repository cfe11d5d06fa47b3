"""Helpers around torch: processes, checkpoints, statistics."""
