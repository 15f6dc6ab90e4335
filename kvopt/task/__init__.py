"""Template and data rows, read, checked, and cut into token ids: context, body (a row's own part) and gold output.

The seam is the place where the context ends and the body begins.
"""
