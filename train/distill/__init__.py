"""Students that learn from a teacher on answers of their own."""
