"""CPU time of `headway --help` and `headway VERB --help` in a fresh process: user and system, median of several.

The promise is under 0.3 s each, without importing torch (which tests/cli/test_cli_main.py checks).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

LIMIT = 0.3
REPEATS = 7


def cpu_seconds(words: list[str]) -> float:
    """CPU seconds of one process, its children's included."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "headway", *words], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> int:
    from headway.cli.main import VERBS

    commands = {"--help": ["--help"], **{f"{verb} --help": [verb, "--help"] for verb in VERBS}}
    # Interleaved, so that a neighbour's burst does not fall on one command alone.
    rounds = [{name: cpu_seconds(words) for name, words in commands.items()} for _ in range(REPEATS)]
    medians = {name: round(statistics.median(row[name] for row in rounds), 3) for name in commands}
    for name, seconds in medians.items():
        print(f"headway {name:16s} {seconds:.3f} s of CPU")
    worst = max(medians.values())
    figures = {"benchmark": "startup", "cpu_seconds": medians, "worst": worst, "limit": LIMIT, "met": worst < LIMIT}
    print(json.dumps({**figures, "load": os.getloadavg()[0]}))
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
