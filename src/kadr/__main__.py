"""`python -m kadr` is `kadr`."""

from kadr.cli.main import main

if __name__ == "__main__":
    main()
