"""Cold starts: seconds and peak memory of fresh processes, each case several times; prints and writes JSON.

Run: python benchmarks/cold.py --out benchmarks/results/cold.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

CASES = {  # name -> (arguments after the interpreter, bar in seconds)
    "import sfumato": (["-c", "import sfumato"], 0.1),
    "bare interpreter": (["-c", "pass"], None),
    "sfumato --help": (["-m", "sfumato", "--help"], 0.5),
    "sfumato generate": (["-m", "sfumato", "generate", "a red apple", "--seed", "1"], 10.0),
}


def run(arguments: list[str], folder: str) -> tuple[float, float]:
    """(seconds, peak resident MB) of a fresh interpreter with `arguments`."""
    started = time.perf_counter()
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own interpreter
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{arguments} ended with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (arguments, bar) in CASES.items():
            seconds, memory = zip(*(run(arguments, folder) for _ in range(options.repeats)), strict=True)
            results[name] = {
                "first_seconds": round(seconds[0], 3),
                "median_seconds": round(statistics.median(seconds), 3),
                "spread_seconds": round(max(seconds) - min(seconds), 3),
                "peak_mb": round(max(memory)),
                "bar_seconds": bar,
            }
            print(json.dumps({name: results[name]}), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
