"""Rewriting rules, one small file each (a rule and its opposite share one); add a file with an ``@operator``
function and it is there.
"""
