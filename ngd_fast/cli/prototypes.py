"""ngd-fast prototypes: build, show, verify and compare banks of prototypes."""

import click

from ngd_fast.cli import refuse


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
@click.option("--out", type=click.Path(dir_okay=False), help="[default: prototypes_5x5.npz, by the layout]")
@click.option(
    "--layout",
    type=click.Choice(["grid", "kmeans"]),
    default="grid",
    show_default=True,
    help="Bins of the plane (the paper's), or clusters of features, which have no empty ones.",
)
@click.option("--grid", type=click.IntRange(1, 64), default=5, show_default=True, help="Bins along each axis.")
@click.option("--fill-radius", type=click.FloatRange(min=1), help="Empty bins look no farther than this many bins.")
@click.option("--k", type=click.IntRange(2, 4096), default=25, show_default=True, help="Clusters of kmeans.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of kmeans.")
@click.option(
    "--class-prior",
    type=click.Choice(["va_of_label"]),
    help="Add a prior for each expression, from its place in the plane; the student has to ask for it.",
)
@click.option("--class-prior-width", type=click.FloatRange(0.2, 10), default=0.4, show_default=True)
@click.pass_context
def build(ctx, teacher, maps, out, layout, split, grid, fill_radius, k, seed, class_prior, class_prior_width, device):
    """Average the teacher's features over a grid of the valence/arousal plane (the paper's Algorithm 1).

    With --layout kmeans over clusters of the features instead, each at its members' mean rating.
    """
    from ngd_fast.devices import pick_device
    from ngd_fast.faces.classes import CLASS_NAMES
    from ngd_fast.prototypes.class_prior import class_conditional_prior
    from ngd_fast.prototypes.from_teacher import build_bank, build_cluster_bank

    clusters = layout == "kmeans"
    refuse(
        ctx,
        ("grid", "fill_radius", "class_prior", "class_prior_width") if clusters else ("k", "seed"),
        "needs a grid; --layout kmeans has none" if clusters else "is for --layout kmeans",
    )
    if clusters:
        out = out or f"prototypes_kmeans{k}.npz"
        bank = build_cluster_bank(teacher, maps, split=split, k=k, seed=seed, device=str(pick_device(device)))
        bank.save(out)
        click.echo(
            f"{k} prototypes, clusters of {bank.counts.min()} to {bank.counts.max()} of {bank.meta['windows']} windows "
            f"of {len(bank.meta['subjects'])} subjects ({split})"
        )
        click.echo(f"{out}  sha256 {bank.checksum}")
        return
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
    if loaded.va is not None:
        rows = [[str(k), n, *(f"{x:+.2f}" for x in loaded.va[k])] for k, n in enumerate(loaded.counts)]
        print_table(["cluster", "windows", "valence", "arousal"], rows, title=str(bank))
    else:
        _show_bins(loaded, str(bank))
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
            path = f"{out}/{name}_{loaded.layout.replace(' ', '')}.png"
            draw(path, loaded)
            click.echo(path)


@command.command()
@click.argument("bank", type=click.Path())
def verify(bank):
    """Check that BANK is whole and unchanged since it was saved; exits 2 where it is not."""
    from ngd_fast.prototypes.bank import PrototypeBank

    loaded = PrototypeBank.load(bank)
    click.echo(f"{bank}: unchanged, {loaded.layout} prototypes of {loaded.embedding_dim} dimensions")
    click.echo(f"sha256 {loaded.checksum}")


@command.command()
@click.argument("banks", nargs=-1, required=True, type=click.Path())
def compare(banks):
    """Compare BANKS of any layout: how many of their bins or clusters have windows, and how far these are apart."""
    from ngd_fast.console import print_table
    from ngd_fast.prototypes.analysis import compared
    from ngd_fast.prototypes.bank import PrototypeBank

    rows = [[bank, *compared(PrototypeBank.load(bank)).values()] for bank in banks]
    cells = [["-" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in row] for row in rows]
    columns = ["bank", "layout", "K", "coverage", "mean separation", "smallest"]
    print_table(columns, cells, title="separation: 1 - cosine between two prototypes with windows of their own")


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
    "order": "rank correlation of distance in the plane with cosine distance",
}


def _show_bins(bank, title: str) -> None:
    from ngd_fast.console import print_table

    # High arousal on top, as the plane is drawn.
    rows = [[f"arousal {bank.centers[j]:+.2f}", *bank.counts[:, j]] for j in reversed(range(bank.grid))]
    print_table(["windows", *(f"valence {c:+.2f}" for c in bank.centers)], rows, title=title)
    for k in bank.empty.nonzero()[0]:
        sources = [_bin_name(bank, s) for s in bank.filled_from[k].nonzero()[0]]
        click.echo(f"empty {_bin_name(bank, k)}: filled from {', '.join(sources)}")
    _say_unreachable(bank.meta.get("rating_levels"), bank.grid)


def _bin_name(bank, k: int) -> str:
    i, j = divmod(int(k), bank.grid)
    return f"({bank.centers[i]:+.2f}, {bank.centers[j]:+.2f})"


def _say_unreachable(levels: int | None, grid: int) -> None:
    from ngd_fast.prototypes.analysis import unreachable_bins

    if levels and (count := unreachable_bins(levels, grid)):
        click.echo(f"{grid}x{grid}: ratings on {levels} levels can never fill {count} of its {grid**2} bins")
