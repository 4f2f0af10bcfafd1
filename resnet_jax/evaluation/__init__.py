"""Exact measures of a network on a data set."""
