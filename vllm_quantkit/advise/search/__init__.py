"""A scheme for each layer: the least divergence that fits a budget of memory or time."""
