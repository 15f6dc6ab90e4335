"""Students: models that are trained under sampled and learned contexts, and then measured.

Installed as ``kvopt.train``.
"""
