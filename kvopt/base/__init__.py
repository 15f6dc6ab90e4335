"""The frozen language model: found, loaded, probed for what it can do, and run after a prefix of keys and values."""
