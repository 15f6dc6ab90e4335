"""A shorter text that does the template's work: which of its tokens may go, by the exact KL on the user's own rows."""
