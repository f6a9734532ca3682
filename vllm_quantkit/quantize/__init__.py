"""Quantising a 16-bit model: `pipeline.quantize` from Python, `quantkit quantize` from a shell."""
