"""`inl` and `python -m inl_cli`: one path, so `torchrun ... -m inl_cli train RECIPE` is `inl train RECIPE`, too.

Everything else is imported in here, so that Ctrl-C ends the command without a traceback while that is done, too.
"""

import sys

CONTROL_C = 130
"""The exit code that a shell gives what Ctrl-C has ended, as 128 and the number of the signal."""


def main() -> None:
    """Entry point of the console script and of `python -m inl_cli`."""
    try:
        from inl_cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(CONTROL_C)


if __name__ == "__main__":
    main()
