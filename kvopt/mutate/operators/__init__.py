"""Rewriting rules, one small file each; add a file with an ``@operator`` function and it is there."""

from kvopt.mutate.operators.registry import FAMILIES, RULE_FAMILIES, Operator, operator, operators

__all__ = ["FAMILIES", "RULE_FAMILIES", "Operator", "operator", "operators"]
