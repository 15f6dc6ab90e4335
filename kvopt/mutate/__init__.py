"""Text mutations of a template: operators, generators, validity, search."""
