"""Contexts in the formats of other tools, one small file each; contexts made of others: moved, joined, shortened."""
