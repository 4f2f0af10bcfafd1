"""Where images and labels come from: TFDS datasets, folders of files, lists, the embedded digits.

base.py says what a source is, and opening.py opens one by its name. Nothing here needs TensorFlow:
TFDS reads ArrayRecord files without it.
"""

from resnet_jax.data.sources.base import Batch, Label, Source
from resnet_jax.data.sources.opening import open_source, open_split, split_names

__all__ = ["Batch", "Label", "Source", "open_source", "open_split", "split_names"]
