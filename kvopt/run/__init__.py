"""A run: the order of its stages, the keys that say which are up to date, and the folder that keeps their results."""
