"""Which decoder layer a parameter belongs to, read from its name."""

from __future__ import annotations


def layer_of(name: str) -> int | None:
    """The number of the layer in a dotted parameter or module name; None for what lies outside the layers
    (embeddings, final norm, head).

    The layers of every decoder that transformers has are a numbered list (``model.layers.3.…``, ``transformer.h.3.…``),
    so it is the first part of the name that is a number; later ones count experts or sub-blocks inside the layer.
    """
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit()), None)
