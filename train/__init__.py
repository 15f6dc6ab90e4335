"""Training of students on sampled and learned contexts (installed as `kvopt.train`)."""
