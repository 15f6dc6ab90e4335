"""The version of kvopt, alone in a module so that whoever writes it into a file imports nothing else."""

VERSION = "0.1.0"
