"""Hold all of the card's free memory but --leave GiB until standard input ends: another program on the same card."""

from __future__ import annotations

import argparse
import sys

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leave", type=float, required=True, metavar="GIB")
    leave = int(parser.parse_args().leave * 2**30)
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - leave), dtype=torch.uint8, device="cuda")
    print(f"another program holds {held.numel() / 2**30:.1f} GiB of the card", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
