"""`python -m ivtp` is the `ivtp` command."""

from ivtp.cli.app import main

if __name__ == "__main__":
    main()
