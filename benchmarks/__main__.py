"""All CPU benchmarks, in one table."""

import pandas as pd
import torch

from benchmarks import branches, record, runner
from benchmarks.runs import rounds
from benchmarks.table import show


def main(arguments: list[str] | None = None) -> None:
    count = rounds(arguments, __doc__)
    rows = [branches.measure(branches.REDUCED, count), record.measure_time(record.SIZES, count)]
    show(
        pd.concat([*rows, record.measure_memory(), runner.measure()]),
        f"Time and memory with random weights at reduced width (float32, {torch.get_num_threads()} threads); holds: "
        f"replay within {branches.ALLOWED_PERCENT:g} % of the formula, record at most {record.ALLOWED} of plain, and "
        f"as large after 1,000 prompts as after 10, `dgkit generate`'s workers (of a model that sleeps) at least "
        f"{runner.ALLOWED:.0%} of the time inside the model",
    )


if __name__ == "__main__":
    main()
