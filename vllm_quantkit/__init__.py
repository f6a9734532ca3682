"""Quantise any model, serve it in vLLM with one flag, and know what it cost you."""

__version__ = "0.1.0"
