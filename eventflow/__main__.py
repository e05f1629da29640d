"""`python -m eventflow` is the `eventflow` command."""

from eventflow.cli import main

if __name__ == "__main__":
    main()
