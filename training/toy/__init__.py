"""The two-dimensional example of the autoguidance paper."""
