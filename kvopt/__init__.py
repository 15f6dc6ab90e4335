"""kvopt: find contexts that make a language model behave as a prompt template makes it behave, and train models on
them.
"""

__version__ = "0.1.0"
