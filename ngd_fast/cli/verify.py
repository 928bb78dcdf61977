"""``ngd-fast verify``."""

import click

from ngd_fast.console import say


@click.command("verify")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
def command(runs):
    """Check the checksums of RUNS and derive their metrics and tables again; says what changed (exit code 2).

    A folder above several runs stands for all of them.
    """
    from ngd_fast.artifacts.verify import verify

    failed = 0
    for run in runs:
        for found in verify(run):
            failed += bool(found.problems)
            click.echo(f"{found.folder}: {'CHANGED' if found.problems else 'as written'}")
            for line in found.problems:
                click.echo(f"  changed  {line}")
            for line in found.checked:
                click.echo(f"  holds    {line}")
            for line in found.notes:
                click.echo(f"  note     {line}")
    if failed:
        say(f"{failed} folder(s) are not as they were written")
        return 2
    return 0
