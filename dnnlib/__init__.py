"""Helpers that need no torch."""

from dnnlib.util import EasyDict as EasyDict

__version__ = "0.1.0"
