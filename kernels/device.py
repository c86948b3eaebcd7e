"""Device functions that more than one Triton kernel uses."""
