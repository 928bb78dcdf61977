"""``ngd-fast ablation``."""

import click

from ngd_fast.cli.student import data_options, overrides_of
from ngd_fast.errors import UserError


class Seeds(click.ParamType):
    """ "1,2,3" as a list of integers."""

    name = "seeds"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            seeds = [int(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}: must be whole numbers with commas between them, such as 1,2,3", param, ctx)
        if len(set(seeds)) < len(seeds):
            self.fail(f"{value!r}: a seed stands twice", param, ctx)
        return seeds


def suite_options(function):
    """Options shared by ``ablation`` and ``sweep``."""
    options = [
        click.option("--seeds", type=Seeds(), default="1,2,3", show_default=True, help="One run for each."),
        click.option("--out", "--outs-dir", "out", type=click.Path(), required=True, help="Folder of the runs."),
        click.option("--side-by-side", type=click.IntRange(1), help="Students that share a feed and a CUDA graph."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("ablation")
@click.option("--configs", default="B0,B1,B2,B3", show_default=True, help="Names or YAML files, with commas between.")
@click.option("--baseline", help="The variant that others are compared with; default: the first.")
@suite_options
@data_options
def command(configs, seeds, out, side_by_side, baseline, overrides, **options):
    """Train several variants over several seeds and print one table: mean, spread, paired bootstrap.

    Run it again after an interruption: finished runs are recognised by their fingerprint, the others continue. A run
    that diverges stops no other; it is named at the end, and the exit status is 2.
    """
    from ngd_fast.student.suite import ablation_jobs, run_suite

    names = [name.strip() for name in configs.split(",") if name.strip()]
    if not names:
        raise UserError("--configs: names no configuration")
    jobs = ablation_jobs(names, seeds, overrides_of(options, overrides), out)
    if baseline is not None and baseline not in {job.config.name for job in jobs}:
        raise UserError(f"--baseline {baseline}: is none of {', '.join(sorted({job.config.name for job in jobs}))}")
    run_suite(jobs, out, baseline=baseline, side_by_side=side_by_side)
