"""`make chaos`: kill the broker a hundred times under load, then use every credential."""

from __future__ import annotations

import argparse
import asyncio
import sys

from broker.dev.chaos import run_chaos


def main() -> int:
    """Run it; exit 0 only if nothing was lost and nothing outlived its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=20)
    chosen = parser.parse_args()
    report = asyncio.run(run_chaos(kills=chosen.kills, seed=chosen.seed, tell=print))
    for detail in report.details[:50]:
        print(detail)
    print(report.summary())
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
