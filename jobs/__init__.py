"""One verb a file, run as ``python -m jobs.VERB PRESET --overrides``."""
