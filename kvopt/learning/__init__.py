"""Learned contexts: where a soft prompt or KV cache starts, and the gradient descent on it."""
