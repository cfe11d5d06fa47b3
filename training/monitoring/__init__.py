"""What a training run shows and writes."""
