"""Factorformer in the Hugging Face ecosystem."""
