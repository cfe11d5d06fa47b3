"""explore.py: a page in a browser that shows what networks make."""
