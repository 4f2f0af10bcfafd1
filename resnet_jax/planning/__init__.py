"""What a run will need on TPUs or GPUs that are not here, from its compiled training step."""
