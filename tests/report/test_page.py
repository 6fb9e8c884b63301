"""The HTML report: what it tells, that nothing in it escapes, and that a real browser shows it without the network."""

from __future__ import annotations

import html as html_text
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import factorformer
from factorformer.errors import OutputError
from factorformer.files import RESULT_FILE
from factorformer.report.page import figures, gather, write
from factorformer.report.page.document import html
from factorformer.report.page.evidence import Weight
from factorformer.training.rank_history import RankHistory

pytest.importorskip("plotly", reason="reports are drawn by plotly, which is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><b>&'\"{{ 7 }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and a compressed one that learned, with a history of ranks and names that break pages."""
    path = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config)
    model.save_pretrained(path / "dense")
    factorformer.compress(model, factorformer.plan(model, "svd", 3.2, int8=True, include="*layer.[012]*"))
    model.save_pretrained(path / "small")
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(3)]
    history = RankHistory([*names, NASTY], ["low_rank"] * 4, [16] * 4)
    history.add(10, [12, 10, 9, 3], [1.0] * 4)
    history.add(20, [8, 4, 9, 1], [1.0] * 4)
    history.save(path / "small")
    record = {
        "method": "svd",
        "command": f"factorformer compress dense small --include '{NASTY}'",
        "metrics": {"original_accuracy": 0.91, "fitted_accuracy": 0.72, "accuracy": 0.9, "predicted_loss_rise": 0.1},
        "fits": {names[0]: {"error": 0.25, "rise": 0.003, "reason": NASTY}},
        "curve": [{"step": 10 * i, "seconds": 30.0 * i, "embedding_cosine": 0.9 + 0.01 * i} for i in range(4)],
        "seconds": {"fit": 1.5},
        "versions": {"torch": "2"},
        "seed": 0,
    }
    (path / "small" / RESULT_FILE).write_text(json.dumps(record))
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    write(gather(str(folder / "small"), str(folder / "dense")), folder / "report.html")
    return folder / "report.html"


def test_what_a_report_tells(folder: Path) -> None:
    found = gather(str(folder / "small"), str(folder / "dense"), time=False).to_dict()
    weights = {weight["name"]: weight for weight in found["weights"]}
    query = weights["encoder.layer.0.attention.self.query"]
    assert (query["role"], query["layer"], query["shape"]) == ("encoder.layer.*.attention.self.query", "0", (64, 64))
    assert (query["fit_error"], query["rise"]) == (0.25, 0.003)
    dense, small = (
        BertModel.from_pretrained(folder / name).get_submodule(query["name"]) for name in ("dense", "small")
    )
    weight, made = dense.weight.detach(), small.to_dense().detach()
    assert query["error"] == pytest.approx(float((weight - made).norm() / weight.norm()), rel=1e-4)
    assert weights["encoder.layer.3.attention.self.query"]["error"] == 0  # left out
    assert query["after"] < query["before"] == 64 * 64 * 4
    spectrum = next(s for s in found["spectra"] if s["name"] == query["name"])
    values = torch.linalg.svdvals(weight.double())
    assert spectrum["values"][-1] == pytest.approx(float(values[-1] / values[0]), rel=1e-3)
    assert spectrum["cut"] == small.spec.rank
    beyond = float(values[small.spec.rank :].square().sum() / values.square().sum())
    assert spectrum["left_out"] == pytest.approx(beyond, rel=1e-6)


def test_what_cannot_be_compared_is_said(folder: Path, tmp_path: Path) -> None:
    assert "--against" in gather(str(folder / "small"), None).notes[0]
    other = BertModel(
        BertConfig(vocab_size=150, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    )
    other.save_pretrained(tmp_path / "other")
    notes = gather(str(folder / "small"), str(tmp_path / "other"), time=False).notes
    assert any("embeddings.word_embeddings" in note and "other shapes" in note for note in notes)


def test_bytes_before_are_those_of_the_original(folder: Path, tmp_path: Path) -> None:
    trimmed = BertModel.from_pretrained(folder / "dense")
    trimmed.resize_token_embeddings(50)
    factorformer.compress(trimmed, factorformer.plan(trimmed, "svd", 2))
    trimmed.save_pretrained(tmp_path / "trimmed")
    found = gather(str(tmp_path / "trimmed"), str(folder / "dense"), time=False).to_dict()
    whole = sum(p.numel() for p in BertModel.from_pretrained(folder / "dense").parameters()) * 4
    assert found["bytes"]["original"] == whole


def test_matrices_that_share_a_dictionary_say_so(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config)
    factorformer.compress(model, factorformer.plan(model, "dense_sparse_plain", 2, share="inputs"))
    model.save_pretrained(tmp_path)
    evidence = gather(str(tmp_path), None)
    owners = {weight.shares for weight in evidence.weights} - {None}
    assert owners
    assert all(f"dictionary of {owner}" in html(evidence) for owner in owners)


def test_experts_and_blocks_have_cells_of_their_own() -> None:
    common = {"shape": (4, 4), "form": "dense", "shares": None, "units": None, "note": "", "before": 64, "after": 64}
    common |= {"flops_before": 32, "flops_after": 32, "error": None, "fit_error": None, "rise": None, "tied": ()}
    weights = [
        Weight(name=f"layers.{i}.experts.{j}.up", role="layers.*.experts.*.up", layer=f"{i}.{j}", **common)
        for i in (0, 10, 2)
        for j in range(3)
    ]
    figure, _ = figures.model_map(weights)
    assert figure["data"][0]["x"] == [f"{i}.{j}" for i in (0, 2, 10) for j in range(3)]
    assert sum(cell is not None for row in figure["data"][0]["z"] for cell in row) == len(weights)


def test_a_record_in_another_form_costs_no_page(folder: Path, tmp_path: Path) -> None:
    small = shutil.copytree(folder / "small", tmp_path / "small")
    (small / RESULT_FILE).write_text(
        '{"metrics": {"accuracy": NaN}, "fits": [1], "curve": [{"step": 1}], "seconds": 3}'
    )
    evidence = gather(str(small), None)
    assert any("fits" in note and "curve" in note and "seconds" in note for note in evidence.notes)
    assert "NaN" not in html(evidence).split('id="library"')[0]


def test_names_are_escaped_and_the_file_is_small(page: Path) -> None:
    text = page.read_text()
    assert page.stat().st_size < 5_000_000
    assert NASTY not in text
    assert html_text.escape(NASTY) in text.replace("&#39;", "&#x27;").replace("&#34;", "&quot;")
    assert "<b>&'" not in text
    assert "http://" not in re.sub(r'id="library">[^<]*', "", text).replace("http://www.w3.org", "")
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert set(figures) == {"map", "costs", "spectra", "ranks", "curve", "latency"}
    assert figures["ranks"]["data"][0]["y"][3].startswith("&lt;/script&gt;")


def test_a_decoder_with_hundreds_of_matrices(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=60, **sizes))
    factorformer.compress(model, factorformer.plan(model, "svd", 1.5))
    model.save_pretrained(tmp_path / "small")
    evidence = gather(str(tmp_path / "small"), None)
    assert len(evidence.weights) > 400
    text = html(evidence)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert len(figures["map"]["data"][0]["y"]) < 12
    assert len(text) < 5_000_000


def test_nothing_half_written_stays(page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = gather(str(folder / "small"), None)
    monkeypatch.setattr("factorformer.report.page.document.html", lambda _: (_ for _ in ()).throw(OutputError("full")))
    with pytest.raises(OutputError):
        write(evidence, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives browsers, is not installed"
    )
    if BROWSER is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser(page: Path, browser: Any, width: int, scheme: str, tmp_path: Path) -> None:
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    shown.wait_for_selector("html[data-drawn]")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    # Every figure is drawn, with a text for those who do not see it, and nothing is wider than the screen.
    figures = shown.query_selector_all(".plot")
    assert len(figures) == 6
    for figure in figures:
        assert figure.query_selector(".main-svg") is not None, figure.get_attribute("id")
        assert figure.get_attribute("role") == "img"
        assert len(figure.get_attribute("aria-label")) > 20
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert contrast(shown, "body") >= 7
    assert min(contrast(shown, name) for name in (".muted", "summary", "figcaption")) >= 4.5
    # Keys alone: past the link to the content to the button, which changes the colours, and back.
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    shown.keyboard.press("Tab")
    shown.keyboard.press("Enter")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != background
    shown.keyboard.press("Enter")
    # A choice shows other traces.
    before = shown.evaluate("document.querySelector('#plot-map .colorbar, #plot-map .cbtitle').textContent")
    shown.select_option("select[data-figure=map]", "error")
    shown.wait_for_function("document.querySelector('#plot-map .cbtitle').textContent.includes('error')")
    assert "error" not in before
    assert said == []
    shown.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    shown.close()


def contrast(shown: Any, selector: str) -> float:
    """Of a text against the page: WCAG 2."""
    colours = shown.evaluate(
        """(selector) => [getComputedStyle(document.querySelector(selector)).color,
        getComputedStyle(document.body).backgroundColor]""",
        selector,
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
