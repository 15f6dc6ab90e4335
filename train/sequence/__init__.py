"""Tasks learned one after the other, and what each stage gives to and takes from the others."""
