"""The summary, the table, the plot and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from PIL import Image

from flows.tracking.result_markdown import result
from tasks.errors import TaskError
from tasks.report import Report, report
from tasks.reporting.columns import columns, one_line
from tasks.reporting.heat_map import _fineness, heat_map
from tasks.reporting.html_page import flat
from tasks.reporting.html_page import page as html_page
from tasks.reporting.pareto_plot import draw, front, pareto, pareto_svg, short
from tasks.reporting.plot_frame import NARROW, WIDE
from tasks.reporting.summary import summarize, winner
from tasks.reporting.table import WIDTH, table
from tasks.settings import Settings, load_settings
from tests.unit.measured import GATE, made_up

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"lost": 0, "size": 269_000_000},
    "int8": {"scheme": "W8A8", "bits": 8, "lost": 0.002, "size": 163_000_000, "worse": 0.006, "speed": 1.1},
    "gptq-int4": {"bits": 4, "lost": 0.015, "size": 112_000_000, "worse": 0.2, "speed": None},
    "awq-int4": {"format": "awq", "bits": 4, "lost": 0.2, "size": 111_000_000, "worse": 0.25, "speed": None},
    "auto": {"scheme": "mixed", "bits": 4, "lost": 0.01, "size": 115_000_000, "worse": 0.1, "speed": None},
}
CROWDED: dict[str, dict[str, Any]] = {
    "base": VARIANTS["base"],
    **{f"variant-{i}-int8": {"bits": 8, "lost": 0.003 * i, "size": 161_000_000 + 2_000_000 * i} for i in range(3)},
    **{f"variant-{i}-int4": {"bits": 4, "lost": 0.008 * i, "size": 118_000_000 - 1_000_000 * i} for i in range(3, 10)},
}
LONG_NAMES = {"x" * 40: VARIANTS["int8"], "y" * 40: VARIANTS["gptq-int4"]}
TARGET = "transformers"
TARGET = "transformers"
Summarize = Callable[..., dict[str, Any]]


@pytest.fixture
def settings() -> Settings:
    """The project's settings with the fast gate of the fake measurements."""
    return load_settings(Path("params.yaml")).model_copy(update={"gate": GATE})


@pytest.fixture
def summary_of(tmp_path: Path) -> Summarize:
    """Write fake measurements and summarize them."""

    def make(variants: dict[str, dict[str, Any]] = VARIANTS, **made: Any) -> dict[str, Any]:
        made_up(tmp_path, variants, **made)
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        return summarize(TARGET, list(variants), GATE, *folders)

    return make


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


class TestSummary:
    def test_the_smallest_that_passes_wins(self, summary_of: Summarize) -> None:
        summary = summary_of()
        verdicts = {v: row["verdict"] for v, row in summary["variants"].items()}
        assert verdicts == {"base": None, "int8": "pass", "gptq-int4": "pass", "awq-int4": "fail", "auto": "pass"}
        assert summary["winner"] == "gptq-int4"

    def test_a_row_says_how_the_variant_was_made(self, summary_of: Summarize) -> None:
        rows = summary_of()["variants"]
        made = ("scheme", "recipe", "format", "backend", "bits", "output_layer")
        assert [rows["int8"][key] for key in made] == ["W8A8", "GPTQ", "compressed-tensors", "modelpress", 8, None]
        assert [rows["base"][key] for key in made] == ["none", "", "", "none", None, None]

    def test_what_llama_cpp_quantized_is_said_to_be_flattered(self, tmp_path: Path) -> None:
        made_up(tmp_path, {"base": VARIANTS["base"], "q4km": VARIANTS["int8"] | {"scheme": "Q4_K_M", "bits": 4}})
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        notes = summarize(TARGET, ["base", "q4km"], GATE, *folders)["notes"]
        assert not [note for note in notes if note.startswith("q4km: ")]
        change_json(tmp_path / "source.json", lambda source: source.update(grid={"group_size": 32}))
        (note,) = [
            note for note in summarize(TARGET, ["base", "q4km"], GATE, *folders)["notes"] if note.startswith("q4km: ")
        ]
        assert "share scales among 32 weights, as did the Q4_1 weights" in note

    def test_each_variant_has_the_gate_of_its_bits(self, summary_of: Summarize) -> None:
        rows = summary_of()["variants"]
        assert {v: row["gate"] for v, row in rows.items()} == {
            "base": None,
            "int8": 0.98,
            "gptq-int4": 0.95,
            "awq-int4": 0.95,
            "auto": 0.95,
        }

    def test_ratios_are_against_the_baseline(self, summary_of: Summarize) -> None:
        row = summary_of()["variants"]["int8"]
        assert row["ratio"] == pytest.approx(269 / 163)
        assert row["speed"]["decode_ratio"] == pytest.approx(1.1)
        assert row["texts"]["news"]["perplexity_change"] == pytest.approx(0.006)
        assert row["kl"] == pytest.approx(0.003)

    def test_a_format_without_a_fast_kernel_has_no_speed(self, summary_of: Summarize) -> None:
        row = summary_of()["variants"]["gptq-int4"]
        assert row["speed"]["decode_ratio"] is None
        assert row["speed"]["fast_kernel"] is False

    def test_flips_are_counted_per_task_and_in_all(self, summary_of: Summarize) -> None:
        row = summary_of()["variants"]["awq-int4"]
        tasks = row["retention"]["tasks"].values()
        assert row["flips"]["lost"] == sum(t["lost"] for t in tasks) > 0
        assert row["flips"]["gained"] == 0
        assert row["flips"]["p_value"] < 1e-6

    def test_notes_say_what_a_reader_must_know(self, summary_of: Summarize) -> None:
        notes = " ".join(summary_of(tasks={"coin": (0.5, 0.5), "few": (0.2, 0.7)}, items=60)["notes"])
        assert "dequantized to bfloat16 from Q4_1" in notes
        assert re.search(r"coin: the baseline scores [\d.]+%, not clearly above the 50.0% of guessing", notes)
        assert "few: the baseline" not in notes
        assert "few has only 60 items" in notes

    def test_another_contract_is_refused_with_both_values(self, tmp_path: Path, summary_of: Summarize) -> None:
        summary_of()

        def other(value: dict[str, Any]) -> None:
            value["contract"] |= {"dtype": "bfloat16", "bos": True}
            value["contract_hash"] = "f" * 64

        change_json(tmp_path / "metrics/evaluate/transformers/int8.json", other)
        with pytest.raises(TaskError) as error:
            summarize(
                TARGET, list(VARIANTS), GATE, tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
            )
        assert "dtype is 'float32' for base, 'bfloat16' for int8" in str(error.value)
        assert "bos is None for base, True for int8" in str(error.value)
        assert "limit" not in str(error.value)

    @pytest.mark.parametrize(
        ("path", "text", "message"),
        [
            (
                "metrics/load/transformers/int8.json",
                None,
                "transformers/int8.json not found; make it with: dvc repro load@transformers-int8",
            ),
            ("metrics/quantize/base.json", "{", "quantize/base.json is not JSON"),
            ("metrics/evaluate/transformers/base.json", "[]", "contains list, expected an object"),
            (
                "results/transformers/int8/items-piqa_local.jsonl",
                None,
                "not found; make it with: dvc repro evaluate@transformers-int8",
            ),
            (
                "results/transformers/int8/items-piqa_local.jsonl",
                '{"item": 1}\n',
                "line 1 is not an item with hash and score",
            ),
            ("results/transformers/int8/items-piqa_local.jsonl", "", "has 0 items with mean score"),
            ("source.json", None, "source.json not found; make it with: dvc repro download"),
        ],
    )
    def test_a_missing_or_broken_file_is_named(
        self, tmp_path: Path, summary_of: Summarize, path: str, text: str | None, message: str
    ) -> None:
        summary_of()
        if text is None:
            (tmp_path / path).unlink()
        else:
            (tmp_path / path).write_text(text)
        with pytest.raises(TaskError, match=re.escape(message)):
            summarize(
                TARGET, list(VARIANTS), GATE, tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
            )

    def test_items_that_the_metrics_were_not_made_from_are_refused(self, tmp_path: Path, summary_of: Summarize) -> None:
        summary_of()
        stale = tmp_path / "results/transformers/int8/items-piqa_local.jsonl"
        lines = stale.read_text().splitlines()
        stale.write_text("\n".join(line.replace('"score": 1', '"score": 0') for line in lines))
        with pytest.raises(
            TaskError, match=r"has 400 items with mean score 0.0000, but int8's metrics say 400 with 0\.6"
        ):
            summarize(
                TARGET, list(VARIANTS), GATE, tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
            )


def test_of_two_equally_small_variants_the_better_wins() -> None:
    rows = {
        "a": {"verdict": "pass", "size_bytes": 5, "retention": {"mean": 0.97}},
        "b": {"verdict": "pass", "size_bytes": 5, "retention": {"mean": 0.98}},
        "c": {"verdict": "fail", "size_bytes": 1, "retention": {"mean": 0.5}},
        "d": {"verdict": "inconclusive", "size_bytes": 2, "retention": {"mean": 1.0}},
    }
    assert winner(rows) == "b"
    assert winner({"c": rows["c"], "d": rows["d"]}) is None


class TestTable:
    def test_it_is_plain_narrow_text_with_every_figure(self, summary_of: Summarize) -> None:
        text = table(summary_of())
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert "\x1b" not in text
        row = next(line for line in text.splitlines() if line.strip().startswith("int8 "))
        for figure in ("163 MB", "1.65x", "1.10x", "27.60 (+0.6%)", "0.003", "99.4%", "pass"):
            assert figure in row
        assert "Winner: gptq-int4, the smallest that passes (112 MB, 2.40x smaller" in text
        assert re.search(r"awq-int4: fail, it keeps at most .* with 95% confidence, and the gate is 95%", text)
        assert "dequantized" in text
        assert "limit: 400" not in text  # the contract is in the page

    def test_that_none_passes_is_said(self, summary_of: Summarize) -> None:
        summary = summary_of({v: VARIANTS[v] for v in ("base", "awq-int4")})
        assert "No variant passes its gate, so nothing will be packaged." in table(summary)

    def test_long_names_and_many_texts_stay_inside_the_width(
        self, summary_of: Summarize, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.unit.measured.TEXTS", {f"text-{i}": 10.0 + i for i in range(5)})
        text = table(summary_of({"base": VARIANTS["base"], "x" * 40: VARIANTS["int8"]}))
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert text.count("text-4 +0.6%") == 1
        assert re.search(r"^x+ .* 163 MB .* pass$", text, re.MULTILINE)

    def test_every_output_has_the_same_words(self, summary_of: Summarize) -> None:
        summary = {**summary_of(), "machine": {}, "versions": {}}
        html = html_page(summary, {}, {"documents": 1}, {"wide": "", "narrow": ""}, {}, {})
        page = " ".join(re.sub(r"<[^>]*>", " ", html).split())
        outputs = {
            "terminal": " ".join(table(summary).split()),
            "Prefect": " ".join(result(summary, "").split()),
            "page": page,
        }
        for column in columns(summary, None):
            for cell in column.cells.values():
                for name, output in outputs.items():
                    for part in (cell.text.split("\n"), [cell.detail]):
                        assert all(word in output for word in part), (name, column.heading, cell)
        assert "W4A16_ASYM: GPTQ, 4.31 bits per weight" in page
        assert 'title="weights are expanded to float32 for every product"' in html

    def test_a_summary_of_ones_own_leaves_cells_empty(self) -> None:
        rows = {"base": {}, "small": {"verdict": "pass", "texts": {"news": {"perplexity": 12.5}}, "ratio": None}}
        found = {one_line(c.heading): [str(cell) for cell in c.cells.values()] for c in columns({"variants": rows})}
        assert found == {
            "variant": ["base", "small"],
            "size": ["", ""],
            "ratio": ["", ""],
            "decode speed": ["", ""],
            "items": ["", ""],
            "retention in % (interval)": ["100.0", ""],
            "perplexity, news": ["", "12.50"],
            "KL": ["", ""],
            "same top 1": ["", ""],
            "verdict": ["baseline", "pass"],
        }


class TestPlot:
    def test_front_holds_what_nothing_beats(self) -> None:
        points = {
            "base": (269.0, 100.0),
            "a": (110.0, 96.0),
            "b": (112.0, 95.0),
            "c": (160.0, 99.0),
            "d": (269.0, 98.0),
        }
        assert front(points) == ["a", "c", "base"]

    def test_same_summary_same_picture(self, summary_of: Summarize) -> None:
        summary = summary_of()
        picture = pareto(summary)
        assert Image.open(BytesIO(picture)).size == (1000, 620)
        assert pareto(summary) == picture

    @pytest.mark.parametrize("narrow", [False, True])
    def test_in_the_page_it_is_text_in_the_pages_colours(self, summary_of: Summarize, narrow: bool) -> None:
        summary = summary_of()
        svg = pareto_svg(summary, narrow)
        assert pareto_svg(summary, narrow) == svg
        assert len(svg) < 40_000
        assert not re.search(r"#[0-9a-fA-F]{6}|http|<style|font-family", svg)
        assert {"var(--pass)", "var(--fail)", "var(--ink)", "var(--paper)"} <= set(re.findall(r"var\(--\w+\)", svg))
        assert "awq-int4</text>" in svg
        assert ("111 MB, " in svg) is not narrow
        assert not set(re.findall(r'id="([^"]+)"', svg)) & set(
            re.findall(r'id="([^"]+)"', pareto_svg(summary, not narrow))
        )

    def test_a_heat_map_shows_each_layers_coarsest_cost_and_marks_unusual_choices(self) -> None:
        linears: list[dict[str, Any]] = [
            {
                "name": f"model.layers.{i}.{kind}",
                "chosen": "W8A8" if (i, kind) == (3, "mlp.up_proj") else "W4A16_ASYM@64",
                "costs": {"W4A16_ASYM@64": 0.01 * 10**-i, "W8A8": 1e-9},
            }
            for i in range(4)
            for kind in ("self_attn.q_proj", "mlp.up_proj")
        ]
        linears[0]["costs"] = {"W8A8": 1e-5}  # its groups do not divide it
        linears[1]["costs"] = {}
        found = heat_map(linears)
        assert found is not None
        assert list(found.kinds) == ["q_proj", "up_proj"]
        assert [found.low, found.high] == pytest.approx([1e-5, 0.001])
        assert [cell.strength for cell in found.cells] == [0.0, None, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
        assert [cell.mark for cell in found.cells] == [*[""] * 7, "square"]
        assert found.marks == {"W4A16_ASYM, groups of 64": "", "W8A8": "square"}
        assert found.chosen == {"q_proj": [4, 0], "up_proj": [3, 1]}
        assert found.cells[-1].title.startswith(
            "layer 3, up_proj: W8A8; W4A16_ASYM, groups of 64 costs 1e-05, W8A8 costs"
        )
        assert heat_map([]) is None

    def test_rows_of_a_heat_map_with_the_same_last_name_have_their_whole_name(self) -> None:
        kinds = ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "self_attn.q_proj")
        linears = [{"name": f"model.layers.0.{kind}", "chosen": "W8A8", "costs": {"W8A8": 0.1}} for kind in kinds]
        found = heat_map(linears)
        assert found is not None
        assert list(found.kinds) == [*kinds[:2], "q_proj"]

    def test_precisions_go_from_the_coarsest_to_the_finest(self) -> None:
        labels = ["none", "W8A8", "W8A16@64", "W4A16_ASYM@64", "W4A16@64", "W4A16_ASYM@128"]
        ordered = ["W4A16_ASYM@128", "W4A16@64", "W4A16_ASYM@64", "W8A8", "W8A16@64", "none"]
        assert sorted(labels, key=_fineness) == ordered

    @pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
    @pytest.mark.parametrize(
        "variants",
        [VARIANTS, CROWDED, {v: VARIANTS[v] for v in ("base", "awq-int4")}, {"base": VARIANTS["base"], **LONG_NAMES}],
        ids=["five", "eleven", "two", "long-names"],
    )
    def test_labels_cover_nothing_and_stay_inside(
        self, summary_of: Summarize, variants: dict[str, dict[str, Any]], size: tuple[float, float]
    ) -> None:
        summary = summary_of(variants)
        figure = draw(summary, size)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        labels = {text.get_text().partition("\n")[0]: text.get_window_extent() for text in axes.texts[-len(variants) :]}
        assert set(labels) == ({short(name) for name in variants} if size == NARROW else set(variants))
        for one, other in combinations(labels.values(), 2):
            assert not one.overlaps(other)
        gates = [text.get_window_extent() for text in axes.texts[: -len(variants)]]
        frame = axes.get_window_extent()
        for name, box in labels.items():
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1, name
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1, name
            assert not box.count_overlaps([*gates, *_marks(summary, axes)]), name


def _marks(summary: dict[str, Any], axes: Axes) -> list[Bbox]:
    """The boxes of all points and bars, in pixels."""
    boxes = []
    for row in summary["variants"].values():
        kept = row["retention"] or dict.fromkeys(("mean", "low", "high"), 1)
        mean, low, high = (
            axes.transData.transform((row["size_bytes"] / 1e6, 100 * kept[end])) for end in ("mean", "low", "high")
        )
        boxes += [Bbox([mean, mean]).padded(5), Bbox([low, high]).padded(1)]
    return boxes


class Outside(HTMLParser):
    """Collects all external resources of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "href") and not (value or "").startswith("#"):
                self.found.append(f"{tag} {value}")
        if tag in ("script", "iframe", "link"):
            self.found.append(tag)


class TestReport:
    @pytest.fixture
    def done(self, tmp_path: Path, settings: Settings) -> tuple[Report, Path]:
        made_up(tmp_path, VARIANTS)
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        return report(settings, *folders, tmp_path / "report"), tmp_path / "report"

    def test_it_leaves_all_files(self, done: tuple[Report, Path]) -> None:
        found, folder = done
        names = {"table.txt", "index.html", "manifest.json", "plots/transformers.png"}
        names |= {f"transformers/{name}" for name in ("summary.json", "completions.md")}
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == names
        assert found.decisive[TARGET]["winner"] == "gptq-int4"
        assert (folder / "table.txt").read_text() == found.table
        summary = json.loads((folder / TARGET / "summary.json").read_text())
        assert summary["winner"] == "gptq-int4"
        assert summary["machine"]["cores"] >= 1
        rows, figures = summary["variants"], found.decisive[TARGET]["variants"]
        assert {v: row["verdict"] for v, row in rows.items()} == {v: row["verdict"] for v, row in figures.items()}
        assert figures["int8"]["retention"]["mean"] == rows["int8"]["retention"]["mean"]
        assert figures["int8"]["decode_ratio"] == 1.1
        assert figures["awq-int4"]["completions"] == {"texts": 5, "same": 0, "near_ties": 0, "shared": 1 / 3}
        assert figures["base"]["retention"] is None
        assert "NaN" not in (folder / TARGET / "summary.json").read_text()

    def test_the_page_needs_nothing_from_elsewhere_and_has_the_numbers(self, done: tuple[Report, Path]) -> None:
        text = (done[1] / "index.html").read_text()
        parser = Outside()
        parser.feed(text)
        assert parser.found == []
        assert set(re.findall(r"url\((.)", text)) == {"#"}
        for part in (
            "layers.5.mlp.down_proj",
            "+20.0%",
            "no fast",
            "overlap, boolq",
            "add bos",
            "dequantized",
            "W8A8: GPTQ, 8.31 bits per weight",
        ):
            assert part in text

    def test_the_same_measurements_give_the_same_bytes(
        self, done: tuple[Report, Path], tmp_path: Path, settings: Settings
    ) -> None:
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        report(settings, *folders, tmp_path / "again")
        for path in (path for path in done[1].rglob("*") if path.is_file()):
            assert (tmp_path / "again" / path.relative_to(done[1])).read_bytes() == path.read_bytes()

    def test_markup_in_a_value_stays_text(self, tmp_path: Path, settings: Settings) -> None:
        made_up(tmp_path, VARIANTS)
        change_json(tmp_path / "source.json", lambda s: s.update(source="path:/x/<script>alert(1)</script>"))
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        report(settings, *folders, tmp_path / "report")
        assert "<script" not in (tmp_path / "report/index.html").read_text()

    def test_a_failure_leaves_the_last_report_alone(
        self, done: tuple[Report, Path], tmp_path: Path, settings: Settings
    ) -> None:
        before = (done[1] / TARGET / "summary.json").read_bytes()
        (tmp_path / "metrics/calibrate.json").unlink()
        folders = tmp_path / "metrics", tmp_path / "results", tmp_path / "source.json"
        with pytest.raises(TaskError, match=r"calibrate\.json not found"):
            report(settings, *folders, tmp_path / "report")
        assert (done[1] / TARGET / "summary.json").read_bytes() == before


def test_any_quality_report_becomes_rows_of_text() -> None:
    assert flat({"a_b": {"c": 1234, "d": 0.51234}, "e": [], "f": None, "g": ["x", "y"], "h": True}) == {
        "a b, c": "1,234",
        "a b, d": "0.5123",
        "e": "none",
        "f": "none",
        "g": "x, y",
        "h": "yes",
    }
