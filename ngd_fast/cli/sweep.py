"""``ngd-fast sweep``."""

import click

from ngd_fast.cli.ablation import suite_options
from ngd_fast.cli.student import data_options, overrides_of
from ngd_fast.errors import UserError


@click.group("sweep")
def command():
    """Run one of the paper's sweeps and print one table: mean, spread, paired bootstrap against the paper's value.

    Everything is chosen and compared on the validation split. Run a sweep again after an interruption: finished runs
    are kept, the others continue.
    """


def _values(ctx, param, text):
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: must be numbers with commas between them") from None


def _sweep(kind: str, help_text: str):
    @command.command(kind, help=help_text)
    @click.option("--config", "--cfg", "config", default="B3", show_default=True, help="What is varied.")
    @click.option("--values", callback=_values, metavar="V,V,...", help="Values to try beside the configuration's own.")
    @suite_options
    @data_options
    def run(config, values, seeds, out, side_by_side, overrides, **options):
        from ngd_fast.student.suite import run_suite, sweep_jobs

        jobs, baseline = sweep_jobs(kind, config, values, seeds, overrides_of(options, overrides), out)
        run_suite(jobs, out, baseline=baseline, side_by_side=side_by_side)


_sweep("proto-weight", "The weight of Proto-KD: 0, 0.10, 0.12, 0.15.")
_sweep("ramp-start", "The epoch at which D-Geo sets in: 0, 10, 20, 30, 40; the ramp keeps its length.")
_sweep("geo-weight", "The weight of D-Geo: 0, 0.006, 0.012, 0.024.")


@command.command("grid")
@click.option("--config", "--cfg", "config", default="B3", show_default=True, help="What is varied.")
@click.option("--banks", metavar="FILE,FILE,...", required=True, help="One bank for each grid: 3x3, 5x5, 7x7.")
@suite_options
@data_options
def grid(config, banks, seeds, out, side_by_side, overrides, **options):
    """The grid of the prototypes. Banks are made by ngd-fast prototypes build --grid N."""
    from ngd_fast.student.suite import grid_jobs, run_suite

    if options["bank"] is not None:
        raise UserError("sweep grid takes --banks, one for each grid, instead of --bank")
    files = [name.strip() for name in banks.split(",") if name.strip()]
    jobs, baseline = grid_jobs(config, files, seeds, overrides_of(options, overrides), out)
    run_suite(jobs, out, baseline=baseline, side_by_side=side_by_side)
