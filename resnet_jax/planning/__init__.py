"""What a run needs on TPUs or GPUs, from its training step compiled ahead of time."""
