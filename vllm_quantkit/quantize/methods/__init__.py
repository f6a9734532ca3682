"""Rounding and scaling as pure tensor functions."""
