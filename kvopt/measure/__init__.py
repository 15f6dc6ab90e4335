"""How far a context is from the template: the stored reference, scores with intervals, and single examples."""
