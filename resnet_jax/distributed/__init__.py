"""Devices, processes and hosts: what a run is spread over."""
