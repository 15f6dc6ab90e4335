"""Formats of other tools: one small file each, found by its name (``hf_cache.py`` is ``--to hf-cache``)."""
