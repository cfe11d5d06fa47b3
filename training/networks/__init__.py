"""Raw networks F, and the denoisers that are published as networks."""
