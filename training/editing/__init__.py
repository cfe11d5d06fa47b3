"""What edit_images.py does: images filled in, coloured, restored, encoded and blended by denoisers and NVAEs."""
