import html.parser
import re
import shutil

import pytest

from ngd_fast.artifacts import report_behaviour, report_sections
from ngd_fast.artifacts.files import read_json, write_json
from ngd_fast.artifacts.report import write_report
from ngd_fast.errors import UserError
from ngd_fast.evaluation.metrics import evaluate_predictions

from .conftest import write_run

pytest.importorskip("matplotlib")


class Page(html.parser.HTMLParser):
    """Headings, references and balance of a page's tags."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.sources = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(suite, tmp_path_factory):
    from .conftest import draw

    root = tmp_path_factory.mktemp("report")
    for variant in ("B0", "B3"):
        shutil.copytree(suite / f"{variant}_seed1", root / "outs" / f"{variant}_seed1")
    predictions = draw((50, 40, 30, 20, 20, 0, 10, 0), dataset="ck<plus>")
    folder = root / "outs" / "xval_ck"
    predictions.save(folder / "predictions.npz")
    meta = {"run": "B3_seed1", "variant": "B3", "seed": 1, "dataset": predictions.dataset}
    write_json(folder / "metrics.json", meta | evaluate_predictions(predictions, bootstrap=20))
    write_report([root / "outs"], root / "report.html", viz=root / "viz", extra={"a bank": b"\x89PNG"})
    return root


def test_is_one_file_that_fetches_nothing(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:image/") for source in page.sources)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {link[1:] for link in page.links} == set(page.ids)
    assert {"summary", "training", "classes", "geometry", "features", "prototypes", "xval", "use"} <= set(page.ids)
    assert "ck&lt;plus&gt;" in text
    assert "ck<plus>" not in text


def test_its_numbers_are_those_of_the_runs(report):
    text = (report / "report.html").read_text()
    for run in ("B0_seed1", "B3_seed1"):
        block = read_json(report / "outs" / run / "metrics.json")["valid"]["eight_way"]
        assert re.search(rf"{100 * block['macro_f1']:.2f} <small>\[", text)
    assert "Reported with and without D-Geo (against B0)" in text


def test_what_d_geo_was_given_is_shown_where_all_agree(suite, tmp_path, monkeypatch):
    seen = {}
    for name, module in (("timeline_figure", report_sections), ("geometry_figure", report_behaviour)):
        draw = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, draw=draw, name=name, **o: seen.update({name: (*a[1:], o)}) or draw(*a, **o),
        )
    for variant in ("B0", "B3"):
        shutil.copytree(suite / f"{variant}_seed1", tmp_path / variant)
    write_report([tmp_path], tmp_path / "r.html", embedding="none")
    assert seen == {"timeline_figure": ((1.0, 3.0), {}), "geometry_figure": ({"var_cap": 0.2, "margin": 0.5},)}
    other = write_run(tmp_path / "B3_late", variant="B3_late")
    fingerprint = read_json(other / "ablation_fingerprint.json")
    write_json(other / "ablation_fingerprint.json", fingerprint | {"switches": {"d_geo": True}})
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("start: 1.0", "start: 2.0"))
    write_report([tmp_path], tmp_path / "r.html", embedding="none")
    assert seen["timeline_figure"] == (None, {}), "a sweep's ramps are several"


def test_figures_and_tables_lie_beside_it(report):
    names = {p.name for p in (report / "viz").iterdir()}
    for stem in ("timeline", "terms", "per_class", "confusion_B3", "reliability", "geometry", "tsne"):
        assert {f"{stem}.pdf", f"{stem}.svg", f"{stem}.png"} <= names, stem
    assert {"confusion_xval_ck.pdf", "confusion_xval_ck_present.pdf"} <= names
    assert {"xval_main.tex", "ablation_lite.tex"} <= names


def test_the_same_runs_give_the_same_page(report):
    for name in ("a", "b"):
        write_report([report / "outs" / "B3_seed1"], report / f"{name}.html", embedding="none")
    assert (report / "a.html").read_bytes() == (report / "b.html").read_bytes()


def test_evaluations_in_folders_of_one_name_have_a_picture_each(make_predictions, tmp_path):
    blocks = evaluate_predictions(make_predictions(), bootstrap=0)
    for variant in ("B0", "B3"):
        meta = {"run": variant, "variant": variant, "seed": 1, "dataset": "CK"}
        write_json(tmp_path / variant / "ck" / "metrics.json", meta | blocks)
    write_report([tmp_path], tmp_path / "r.html", viz=tmp_path / "viz")
    found = {p.name for p in (tmp_path / "viz").glob("confusion_*.pdf")}
    assert found == {"confusion_ck_B0_CK.pdf", "confusion_ck_B3_CK.pdf"}


def test_one_run_alone_makes_a_report(run, tmp_path):
    (run / "log.jsonl").unlink()
    (run / "ablation_fingerprint.json").unlink()
    page = Page(write_report([run], tmp_path / "r.html", embedding="none").read_text())
    assert "training" not in page.ids
    assert "summary" in page.ids


def test_compares_with_the_baseline_asked_for(report):
    """As a sweep does, whose baseline is the paper's value and seldom the first by name."""
    runs, page = report / "outs", report / "b.html"
    write_report([runs], page, viz=report / "b", embedding="none", baseline="B3")
    assert "Macro-F1 vs B3" in page.read_text()
    assert read_json(report / "b" / "ablation_lite.json")["baseline"] == "B3"
    with pytest.raises(UserError, match="baseline 'B9' is not among"):
        write_report([runs], page, embedding="none", baseline="B9")


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="embedding must be"):
        write_report([tmp_path], tmp_path / "r.html", embedding="pca")
