"""The JSON files that kvopt writes, each as one typed model."""
