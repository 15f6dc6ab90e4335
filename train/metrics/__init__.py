"""Metrics of answers: one small file each, found by its name (``json_valid.py`` is ``json-valid``)."""
