"""Where a learned context starts: one small file each, found by its name (``strided.py`` is ``init: strided``).

Real text beats noise (Cartridges, arXiv 2506.06266, ablation of initialisations), and attention matching beats plain
text.
"""
