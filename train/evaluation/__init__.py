"""Measuring a base and its students: answers under many contexts, metrics, likelihoods, forgetting."""
