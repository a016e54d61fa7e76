"""`python -m volvelle` is the command `volvelle`."""

from volvelle.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
