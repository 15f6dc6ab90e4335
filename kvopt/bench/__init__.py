"""Speed and memory against other ways to do the same, as ratios from one run."""
