"""Factorized layers, and how they take the place of dense ones."""
