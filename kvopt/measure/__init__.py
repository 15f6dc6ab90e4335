"""How far a context is from the template: the reference, its moments, scores with intervals, and single examples."""
