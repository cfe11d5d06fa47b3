"""Making datasets from images as people have them."""
