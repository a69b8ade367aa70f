"""Measurements; nothing in the package imports this folder."""
