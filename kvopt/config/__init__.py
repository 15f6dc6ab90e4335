"""Everything that can be written in the YAML file, checked; nothing here computes, and nothing loads torch."""
