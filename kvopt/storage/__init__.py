"""Bytes on disk: written whole or not at all, hashed, locked against other processes."""
