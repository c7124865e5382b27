"""`python -m midskip`, which is `midskip`."""

from midskip.cli import program

if __name__ == "__main__":
    program()
