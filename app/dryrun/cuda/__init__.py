"""What CUDA does that the meta device does not show."""
