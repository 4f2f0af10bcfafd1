"""Exact measures of a network on a dataset."""
