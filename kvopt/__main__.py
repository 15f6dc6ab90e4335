"""``python -m kvopt``: the command line."""

from kvopt.cli import main

if __name__ == "__main__":
    main()
