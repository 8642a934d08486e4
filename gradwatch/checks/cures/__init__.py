"""Remedies, tried on copies of a model."""
