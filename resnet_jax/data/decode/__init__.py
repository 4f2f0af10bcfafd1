"""From a file's bytes to pixels, on the host."""
