"""The drafters: a folder for each, with one line in `registry.py`."""
