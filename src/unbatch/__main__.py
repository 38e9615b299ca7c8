"""``python -m unbatch``: the command line."""

from unbatch.command.cli import main

if __name__ == "__main__":
    main()
