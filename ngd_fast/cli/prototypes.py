"""ngd-fast prototypes: build, show, verify and compare banks of prototypes."""

import click


@click.group("prototypes")
def command():
    """Build, show and verify a bank of prototypes."""


def _source(function):
    for option in (
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto."),
        click.option(
            "--split",
            type=click.Choice(["validation", "train", "all"]),
            default="validation",
            show_default=True,
            help="Whose windows: of the teacher's validation subjects (the paper's way), its training ones, or all.",
        ),
        click.option(
            "--maps", required=True, multiple=True, type=click.Path(), help="Topomaps; repeatable, as for the teacher."
        ),
        click.option("--teacher", required=True, type=click.Path(), help="A teacher's run folder or safetensors file."),
    ):
        function = option(function)
    return function


@command.command()
@_source
@click.option("--out", type=click.Path(dir_okay=False), help="[default: prototypes_5x5.npz, by the grid]")
@click.option("--grid", type=click.IntRange(1, 64), default=5, show_default=True, help="Bins along each axis.")
@click.option("--fill-radius", type=click.FloatRange(min=1), help="Empty bins look no farther than this many bins.")
@click.option(
    "--class-prior",
    type=click.Choice(["va_of_label"]),
    help="Add a prior for each expression, from its place in the plane; the student has to ask for it.",
)
@click.option("--class-prior-width", type=click.FloatRange(0.2, 10), default=0.4, show_default=True)
def build(teacher, maps, out, split, grid, fill_radius, class_prior, class_prior_width, device):
    """Average the teacher's features over a grid of the valence/arousal plane (the paper's Algorithm 1)."""
    from ngd_fast.devices import pick_device
    from ngd_fast.faces.classes import CLASS_NAMES
    from ngd_fast.prototypes.class_prior import class_conditional_prior
    from ngd_fast.prototypes.from_teacher import build_bank

    out = out or f"prototypes_{grid}x{grid}.npz"
    bank = build_bank(teacher, maps, split=split, grid=grid, fill_radius=fill_radius, device=str(pick_device(device)))
    if class_prior:
        prior = class_conditional_prior(CLASS_NAMES, grid, width=class_prior_width)
        bank = bank.with_class_prior(
            prior, {"kind": class_prior, "width": class_prior_width, "class_names": list(CLASS_NAMES)}
        )
    bank.save(out)
    click.echo(
        f"{bank.grid}x{bank.grid} prototypes from {bank.meta['windows']} windows of {len(bank.meta['subjects'])} "
        f"subjects ({split}); {int(bank.empty.sum())} of {bank.grid**2} bins empty and filled"
    )
    _say_unreachable(bank.meta["rating_levels"], bank.grid)
    click.echo(f"{out}  sha256 {bank.checksum}")


@command.command()
@click.argument("bank", type=click.Path())
@click.option("--out", type=click.Path(file_okay=False), help="Folder for pictures of coverage and centres.")
def show(bank, out):
    """Show BANK: windows in each bin, which bins were empty and from where they were filled, how far apart they are."""
    from ngd_fast.console import print_table
    from ngd_fast.prototypes.analysis import separation
    from ngd_fast.prototypes.bank import PrototypeBank

    loaded = PrototypeBank.load(bank)
    grid = loaded.grid
    # High arousal on top, as the plane is drawn.
    rows = [[f"arousal {loaded.centers[j]:+.2f}", *loaded.counts[:, j]] for j in reversed(range(grid))]
    print_table(["windows", *(f"valence {c:+.2f}" for c in loaded.centers)], rows, title=str(bank))
    for k in loaded.empty.nonzero()[0]:
        sources = [_bin_name(loaded, s) for s in loaded.filled_from[k].nonzero()[0]]
        click.echo(f"empty {_bin_name(loaded, k)}: filled from {', '.join(sources)}")
    _say_unreachable(loaded.meta.get("rating_levels"), grid)
    measures = {**separation(loaded), "silhouette": loaded.meta.get("silhouette")}
    for name, text in _MEASURES.items():
        if measures.get(name) is not None:
            click.echo(f"{text}: {measures[name]:.3f}")
    for key in ("split", "subjects", "teacher_sha256", "maps_sha256"):
        if key in loaded.meta:
            click.echo(f"{key}: {loaded.meta[key]}")
    click.echo(f"sha256: {loaded.checksum}")
    if out:
        from ngd_fast.prototypes.figures import draw_centers, draw_coverage

        for name, draw in (("coverage", draw_coverage), ("centers", draw_centers)):
            path = f"{out}/{name}_{grid}x{grid}.png"
            draw(path, loaded)
            click.echo(path)


@command.command()
@click.argument("bank", type=click.Path())
def verify(bank):
    """Check that BANK is whole and unchanged since it was saved; exits 2 where it is not."""
    from ngd_fast.prototypes.bank import PrototypeBank

    loaded = PrototypeBank.load(bank)
    click.echo(f"{bank}: unchanged, {loaded.grid}x{loaded.grid} prototypes of {loaded.embedding_dim} dimensions")
    click.echo(f"sha256 {loaded.checksum}")


@command.command()
@_source
@click.option("--smallest", type=click.IntRange(1, 64), default=3, show_default=True, help="Smallest grid.")
@click.option("--largest", type=click.IntRange(1, 64), default=9, show_default=True, help="Largest grid.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the rows here too.")
def sweep(teacher, maps, split, smallest, largest, json_path, device):
    """Compare grid sizes: empty bins, those that the rating scale can never fill, and separation."""
    from ngd_fast.artifacts.files import write_json
    from ngd_fast.console import print_table
    from ngd_fast.devices import pick_device
    from ngd_fast.errors import UserError
    from ngd_fast.prototypes.analysis import sweep_grids
    from ngd_fast.prototypes.from_teacher import rated_features

    if largest < smallest:
        raise UserError(f"--largest {largest}: must not be below --smallest {smallest}")
    features, ratings, _ = rated_features(teacher, maps, split=split, device=str(pick_device(device)))
    rows = sweep_grids(features, ratings, range(smallest, largest + 1))
    columns = ("bins", "empty", "unreachable", "smallest", "silhouette", "mean_cosine", "max_cosine", "order")
    table = [
        [f"{row['grid']}x{row['grid']}", *(f"{v:.3f}" if isinstance(v := row.get(c), float) else v for c in columns)]
        for row in rows
    ]
    print_table(["grid", *columns], table, title=f"{len(ratings)} windows, {split} subjects")
    for row in rows:
        _say_unreachable(row["levels"], row["grid"])
    if json_path:
        write_json(json_path, rows)


_MEASURES = {
    "silhouette": "silhouette of the windows, cosine (-1 to 1; 0: bins are not told apart)",
    "mean_cosine": "mean cosine between prototypes with windows of their own",
    "max_cosine": "largest cosine between two of them",
    "order": "rank correlation of distance in the grid with cosine distance",
}


def _bin_name(bank, k: int) -> str:
    i, j = divmod(int(k), bank.grid)
    return f"({bank.centers[i]:+.2f}, {bank.centers[j]:+.2f})"


def _say_unreachable(levels: int | None, grid: int) -> None:
    from ngd_fast.prototypes.analysis import unreachable_bins

    if levels and (count := unreachable_bins(levels, grid)):
        click.echo(f"{grid}x{grid}: ratings on {levels} levels can never fill {count} of its {grid**2} bins")
