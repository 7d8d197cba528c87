"""Run the command line as a module: `python -m vg train ...`."""

from vg.cli import main

if __name__ == "__main__":
    main()
