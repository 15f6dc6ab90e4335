"""Scripts that are copied into exports. Each runs on its own, without kvopt."""
