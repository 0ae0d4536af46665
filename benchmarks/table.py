"""Printing."""

import pandas as pd

DECIMALS = {
    "ms": 1,
    "ratio": 3,
    "expected": 3,
    "spread %": 1,
    "off %": 1,
    "MB": 3,
    "peak GB": 2,
    "TFLOP": 2,
    "TFLOP ratio": 3,
    "TFLOP/s": 1,
    "share of peak": 2,
}


def show(rows: pd.DataFrame, title: str) -> None:
    """Print the table under its title; cells that do not apply stay empty."""
    shown = rows.copy()
    for column in shown:
        decimals = DECIMALS.get(str(column))
        shown[column] = [
            "" if pd.isna(v) else f"{v:.{decimals}f}" if decimals is not None else {True: "yes", False: "no"}.get(v, v)
            for v in shown[column].tolist()
        ]
    print(f"{title}\n\n{shown.to_string(index=False)}", flush=True)
