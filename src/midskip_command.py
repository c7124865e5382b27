"""The program `midskip`. It stands outside of the package, which sees by it that it need not load torch by itself."""

import sys


def main() -> int:
    try:
        from midskip.cli import program

        program()
    except KeyboardInterrupt:  # while a module is imported, or while an error is told
        print("midskip: interrupted", file=sys.stderr)
        return 130
