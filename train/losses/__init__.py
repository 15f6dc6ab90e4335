"""Losses of students on gold tokens: one small file each, found by its name (``anchored_kl.py`` is ``anchored-kl``)."""
