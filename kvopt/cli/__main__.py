"""``python -m kvopt.cli``."""

from kvopt.cli import main

if __name__ == "__main__":
    main()
