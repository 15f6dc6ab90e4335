"""What can stand in for the template: another text, a soft prompt or a KV cache.

Every kind can be turned into a KV prefix that bodies attend to.
"""

from kvopt.contexts.context import Context, KVContext, NoContext, SoftContext, TextContext
from kvopt.contexts.folder import load_context, save_context

__all__ = ["Context", "KVContext", "NoContext", "SoftContext", "TextContext", "load_context", "save_context"]
