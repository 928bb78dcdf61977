"""ngd-fast flows: the study of coupled flows (arXiv 2604.16801), apart from everything else."""

import click


@click.group("flows")
def command():
    """Study coupled flows: particles on a manifold, and weights that follow them."""


@command.command()
@click.option("--manifold", help="circle, torus, sphere, or an NPZ of points (its k-NN graph).  [default: sphere]")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(["trace", "oja", "sanger", "projected", "hebb"]),
    help="How the weights follow; repeatable.  [default: all]",
)
@click.option("--out", default="outs/flows", show_default=True, type=click.Path(file_okay=False), help="Run folder.")
@click.option("--seed", type=click.IntRange(0), help="[default: 0]")
@click.option("--config", "config_path", type=click.Path(dir_okay=False), help="Settings as YAML.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
def study(manifold, rules, out, seed, config_path, overrides, device):
    """Move particles, let the rules learn from them, and hold all of it against what is exact."""
    from ngd_fast.config import as_override, load_config
    from ngd_fast.console import print_table
    from ngd_fast.devices import pick_device
    from ngd_fast.flows.study import StudyConfig, run_study, table_of

    given = {"manifold": manifold, "rules": list(rules) or None, "seed": seed}
    overrides = [*overrides, *(as_override(key, value) for key, value in given.items() if value is not None)]
    config = load_config(StudyConfig, config_path, overrides)
    metrics = run_study(config, out, device=str(pick_device(device)))
    title = f"{config.manifold}: {config.particles:,} particles, {config.steps:,} moves"
    print_table(*table_of(metrics), title=title)
    click.echo(out)


@command.command()
@click.argument("studies", nargs=-1, required=True, type=click.Path())
@click.option("--out", default="flows.html", show_default=True, type=click.Path(dir_okay=False), help="Page to write.")
def report(studies, out):
    """Gather the figures and numbers of STUDIES (their --out folders) into one self-contained HTML page."""
    from ngd_fast.flows.report import write_report

    click.echo(write_report(studies, out))
