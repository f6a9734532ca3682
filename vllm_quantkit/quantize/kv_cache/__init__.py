"""Calibration of the KV cache: what is taken from keys, and which layers 4 bits do for."""
