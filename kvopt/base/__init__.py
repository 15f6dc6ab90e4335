"""One frozen language model: found, loaded, probed for what it can do, and run behind a prefix of keys and values."""
