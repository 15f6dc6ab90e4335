"""Template and rows become token ids: the context C, the inputs V, the gold output Y, and the seam between them."""
