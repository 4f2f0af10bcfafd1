"""The recorder needs other frameworks, which the default suite does without."""

collect_ignore = ["record_foreign.py"]
