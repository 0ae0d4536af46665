"""What CFG + DG costs and what is lost of it under each schedule of chapter 5, on one shipped model.

Cost in block evaluations over CFG's; distance to full CFG + DG, 1 being that of CFG alone; with 150 images or more the
judge's Frechet distance and its change. Block, channels, s and w are the model's preset.

    python -m benchmarks.frontier tiny-dit --samples 150
"""

import argparse

import dgkit
from benchmarks.table import show
from dgbook.chapters.comparison import schedule_table, schedule_values
from dgbook.chapters.sampling import samples
from dgbook.measures.judges import judge_of
from dgkit.zoo import settings_for


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a name of the zoo or a pipeline folder")
    parser.add_argument("--samples", type=int, default=150, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the set (default: %(default)s)")
    options = parser.parse_args(arguments)
    pipe = dgkit.load(options.model)
    known = settings_for(pipe)
    run = samples(pipe, options.samples, options.seed, options.steps)
    judge = judge_of(pipe, run.conditions)
    w, block, dims = known.scale_with_cfg, known.block, known.dims
    if w is None or block is None or dims is None:
        parser.error(f"{options.model} has no preset of block, channels and w")
    values = schedule_values(pipe, run, w, block, dims, known.guidance_scale, judge)
    table = schedule_table(values).reset_index()
    show(table, f"{options.model}: CFG + DG under schedules, {options.samples} images in {options.steps} steps")


if __name__ == "__main__":
    main()
