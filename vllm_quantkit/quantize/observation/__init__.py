"""What calibration text shows of a layer's inputs, and how far it can be trusted."""
