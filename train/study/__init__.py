"""Studies: a grid of arms × seeds, trained and evaluated at equal budgets, on one table."""
