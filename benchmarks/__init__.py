"""Time and memory of dgkit on the paper's four models, with random weights: never for results about images.

`make bench` (or `python -m benchmarks`) runs `branches` and `record` on the CPU, at reduced width, and prints one
table. `python -m benchmarks.full_size` runs the real sizes on one GPU with 80 GB and writes a JSON.
"""
