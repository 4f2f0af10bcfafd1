"""Images: sources, decoding, augmentation, and the batches of a run."""
