"""The order of stages, the keys that say which are still good, and the folder that keeps their artefacts."""
