"""``python -m docs.pictures [NAME ...]`` draws pictures; ``--record`` runs the schedules anew."""

from __future__ import annotations

import argparse

from .data import FOLDER, PICTURES
from .draw import draw
from .record import record

parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
parser.add_argument("--record", action="store_true", help="run the schedules, on four processes")


if __name__ == "__main__":
    args = parser.parse_args()
    if args.record:
        record()
    for name in args.names or PICTURES:
        print(draw(name, PICTURES[name](), FOLDER))
