"""The command `kadr`, which is also `python -m kadr`."""

from kadr.cli.terminal.signals import handle_signals


def main() -> None:
    """Runs the command line, and handles signals already while it is imported."""
    with handle_signals():
        from kadr.cli.main import run

        run()


if __name__ == "__main__":
    main()
