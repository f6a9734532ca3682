"""Measures tiles of the Triton kernels on a GPU, and writes the tables that serving reads."""
