"""ngd-fast prototypes: build, show, verify and compare banks of prototypes."""

import click


@click.group("prototypes")
def command():
    """Build, show and verify a bank of prototypes."""


@command.command()
@click.option("--teacher", required=True, type=click.Path(), help="A teacher's run folder or its safetensors file.")
@click.option("--maps", required=True, type=click.Path(), help="Topomaps (*_topomaps_all.npz).")
@click.option("--out", default="prototypes_5x5.npz", show_default=True, type=click.Path(dir_okay=False))
@click.option(
    "--split",
    type=click.Choice(["validation", "train", "all"]),
    default="validation",
    show_default=True,
    help="Whose windows: of the teacher's validation subjects (the paper's way), its training subjects, or everybody.",
)
@click.option("--grid", type=click.IntRange(1, 64), default=5, show_default=True, help="Bins along each axis.")
@click.option("--fill-radius", type=click.FloatRange(min=1), help="Empty bins look no farther than this many bins.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
def build(teacher, maps, out, split, grid, fill_radius, device):
    """Average the teacher's features over a grid of the valence/arousal plane (the paper's Algorithm 1)."""
    from ngd_fast.cli.teacher import resolve_device
    from ngd_fast.prototypes.from_teacher import build_bank

    bank, _, _ = build_bank(
        teacher, maps, split=split, grid=grid, fill_radius=fill_radius, device=resolve_device(device)
    )  # fmt: skip
    bank.save(out)
    click.echo(
        f"{bank.grid}x{bank.grid} prototypes from {bank.meta['windows']} windows of {len(bank.meta['subjects'])} "
        f"{split} subjects; {int(bank.empty.sum())} of {bank.grid**2} bins empty and filled"
    )
    click.echo(f"{out}  sha256 {bank.checksum}")


@command.command()
@click.argument("bank", type=click.Path())
def verify(bank):
    """Check that BANK is whole and unchanged since it was saved; exits 2 where it is not."""
    from ngd_fast.prototypes.bank import PrototypeBank

    loaded = PrototypeBank.load(bank)
    click.echo(f"{bank}: unchanged, {loaded.grid}x{loaded.grid} prototypes of {loaded.embedding_dim} dimensions")
    click.echo(f"sha256 {loaded.checksum}")
