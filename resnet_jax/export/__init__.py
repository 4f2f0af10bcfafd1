"""Programs and files for other systems."""
