"""All CPU benchmarks, in one table."""

import pandas as pd
import torch

from benchmarks import branches, record
from benchmarks.runs import rounds
from benchmarks.table import show


def main(arguments: list[str] | None = None) -> None:
    count = rounds(arguments, __doc__)
    rows = [branches.measure(branches.REDUCED, count), record.measure_time(record.SIZES, count)]
    show(
        pd.concat([*rows, record.measure_memory()]),
        f"Time and memory with random weights at reduced width (float32, {torch.get_num_threads()} threads); holds: "
        f"replay within {branches.ALLOWED_PERCENT:g} % of the formula, record at most {record.ALLOWED} of plain, and "
        f"as large after 1,000 prompts as after 10",
    )


if __name__ == "__main__":
    main()
