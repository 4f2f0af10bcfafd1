"""Weights of other frameworks: names, layouts and files."""
