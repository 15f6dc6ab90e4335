"""Files on disk: written whole or not at all, hashed, and locked against other processes."""
