"""Training methods for factors; usable from any training loop."""
