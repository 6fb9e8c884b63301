"""Measurements for plans by loss: error curves, sensitivities, times."""
