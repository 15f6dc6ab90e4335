"""What a terminal, or a log file, is shown: progress of long work, and tables."""
