"""Observed orders, mean and variance of every sampler on problems with known answers, as JSON and as a table.

Run: python benchmarks/orders.py --out benchmarks/results/orders.json --docs docs/samplers.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "diffusion"))

from theory import (  # pyright: ignore[reportMissingImports]
    ENDS_ONLY,
    GAUSSIAN,
    LOW,
    ends_only,
    even,
    extrapolated,
    global_errors,
    local_errors,
    rate,
    solvers,
    stochastic,
    uneven,
)

from sfumato.diffusion.samplers import SAMPLERS

BEGIN, END = "<!-- orders: written by benchmarks/orders.py -->", "<!-- /orders -->"


def measured() -> dict[str, dict[str, Any]]:
    """What theory says of every row that it can be asked about, and of rows with options."""
    found: dict[str, dict[str, Any]] = {
        name: {"claimed": row.order, "evaluations": row.evaluations} for name, row in SAMPLERS.items()
    }
    for name, (row, options) in solvers().items():
        errors = global_errors(row, [60, 120, 240], **options)
        found[name] |= {
            "options": {key: value for key, value in options.items() if key != "schedule"},
            "global": round(rate(errors[0], errors[2], 4), 2),
            "error_60": errors[0],
            "local_uneven": round(rate(*local_errors(row, [0.04, 0.02], uneven, **options)), 2),
            "local_even": round(rate(*local_errors(row, [0.04, 0.02], even, **options)), 2),
        }
    for name in ENDS_ONLY:
        runs = [ends_only(name, count) for count in (60, 120, 240)]
        if name == "dpm_adaptive":
            runs = [ends_only(name, 10, rtol=rtol, atol=rtol / 10) for rtol in (0.05, 0.005, 0.0005)]
        found[name] |= {"runs": [{"error": error, "evaluations": calls} for error, calls in runs]}
    variance = GAUSSIAN.deviation**2 + LOW**2
    for name, run in stochastic().items():
        ends = [run(steps) for steps in (100, 200, 400)]
        ratios = [end.variance / variance for end in ends]
        found.setdefault(name, {})
        found[name] |= {
            "mean_error": ends[-1].mean - GAUSSIAN.mean,
            "variance_ratio": ratios,
            "variance_limit": extrapolated(ratios),
        }
    return found


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown: of the equation without noise, of own levels, and of what noise does."""
    lines = [
        "| sampler | order | evaluations | one step | equal steps | whole run | error at 60 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if "global" in one:
            told = "".join(f", {key} {value:g}" for key, value in one["options"].items())
            cells = [f"`{name}`{told}", one["claimed"], one["evaluations"]]
            cells += [f"{one[key]:.2f}" for key in ("local_uneven", "local_even", "global")]
            lines.append(_line([*cells, f"{one['error_60']:.1e}"]))
    lines += ["", "| sampler | evaluations: error of whole runs |", "|---|---|"]
    for name in ENDS_ONLY:
        runs = ", ".join(f"{run['evaluations']:.0f}: {run['error']:.1e}" for run in found[name]["runs"])
        lines.append(_line([f"`{name}`", runs]))
    lines += [
        "",
        "| sampler | error of the mean | variance, 100 steps | 200 | 400 | limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        if "variance_limit" in one:
            key, _, options = name.partition(",")
            ratios = [f"{ratio:.4f}" for ratio in (*one["variance_ratio"], one["variance_limit"])]
            lines.append(_line([f"`{key}`{options and ','}{options}", f"{one['mean_error']:+.0e}", *ratios]))
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--docs", type=Path, help="a page whose tables between the marks are replaced")
    options = parser.parse_args()
    found = measured()
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    if options.docs:
        page = options.docs.read_text()
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        assert BEGIN in page and END in page, f"{options.docs} has no marks {BEGIN} ... {END}"
        options.docs.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
