"""The recorder needs PyTorch, which the default suite does without."""

collect_ignore = ["networks.py", "record.py"]
