"""The commands of `python -m bench`, one file each; `__main__.py` parses what they are given."""
