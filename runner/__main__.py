"""`python -m runner`."""

import sys


def start() -> None:
    """Run the command line; an interrupt while it is still being imported is one line, too."""
    try:
        from runner.cli import main
    except KeyboardInterrupt:
        print("runner: interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)
    main()


if __name__ == "__main__":
    start()
