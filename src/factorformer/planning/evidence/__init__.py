"""Measurements for plans by loss: error curves, times."""
