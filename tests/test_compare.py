"""The comparison: honest numbers over a grid, one page that stands alone and shows no private example."""

from __future__ import annotations

import csv
import re
from base64 import b64decode
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from audits import EVIL, an_audit, example, run
from browser import CHROMIUM, probe
from pages import Page

from unbatch.analysis import Bound
from unbatch.command.cli import main
from unbatch.reporting.change import changes
from unbatch.reporting.comparison import comparison_page, headline
from unbatch.reporting.curve import of_one_number, strength_curves
from unbatch.reporting.heat_map import heat_maps
from unbatch.reporting.results import Client
from unbatch.reporting.spot import setting_of, spots
from unbatch.reporting.trial import Trial
from unbatch.reporting.trials import Trials


def bound(value: float, client: int = 0) -> Bound:
    return Bound(name="a", value=value, scope="any", assumptions="some", source="us", client=client)


def trial(
    defence: str = "", batch: int = 2, *scores: float | None, attack: str = "bias-ratio", words: str = "", **more: Any
) -> Trial:
    """One of a sweep over pictures: the score of each example that its attack returned; none: it could not run."""
    key = f"{defence} {batch} {attack} {more.get('protocol', '')}"
    asked = {"case": f"photos:batch={batch},width=8", "defence": defence.split("+"), "attack": attack}
    asked |= {"protocol": more.pop("protocol")} if "protocol" in more else {}
    chosen = {name: value for name, value in asked.items() if value and value != [""]}
    if words:
        return Trial(key=key, configuration=chosen, words=words)
    shown = [example(i, score, None if score is None else 10 ** (-score / 20)) for i, score in enumerate(scores)]
    ran = run(attack, shown) if scores else run(attack, [], status="not applicable")
    held = {
        "fingerprint": f"{defence}{batch}",
        "runs": [ran],
        "bounds": [],
        "clients": [Client(index=0, name="client 0", size=batch)],
    }
    stamp = more.pop("created", "2026-01-02T03:04:05+00:00")
    return Trial(key=key, configuration=chosen, created=stamp, audit=an_audit(**(held | more)))


def grid() -> Trials:
    return Trials.of(
        [
            trial("", 1, 131.0),
            trial("", 2, 131.0, 20.0),
            trial("", 2, 12.0, 45.0, attack="unmix"),
            trial("noise:sigma=0.01", 1, 30.0, bounds=[bound(0.01)]),
            trial("noise:sigma=0.01", 2, 12.0, None, bounds=[bound(0.02)]),
            trial("noise:sigma=0.1", 1, words=EVIL),
            trial("noise:sigma=0.1", 2),
            trial("clip:norm=1+noise:sigma=0.1", 2, 11.0, 11.0),
        ],
        missing=[Trial(key="f", configuration={"case": "photos:batch=1,width=8", "defence": ["clip:norm=1"]})],
    )


def test_a_place_counts_the_worst_that_any_attack_made_of_each_example() -> None:
    held = {(spot.defence, spot.batch): spot for spot in spots(grid())}
    both = held["none", 2]
    assert (both.hit, both.size, both.words) == (2, 2, "2 of 2")  # one exact by either attack, the other a copy
    assert both.best == (131.0, 11.5)
    assert held["noise:sigma=0.01", 2].share == 0
    assert held["noise:sigma=0.01", 2].bound == pytest.approx(33.98, abs=0.01)
    assert (held["noise:sigma=0.1", 1].words, held["noise:sigma=0.1", 1].share) == ("failed", None)
    assert (held["noise:sigma=0.1", 2].words, held["noise:sigma=0.1", 2].share) == ("not tested", None)
    assert held["clip:norm=1", 1].words == "not run"


def test_a_bound_is_that_of_the_client_it_protects_least_and_none_where_one_has_none() -> None:
    two = [Client(index=i, name=f"client {i}", size=1) for i in range(2)]
    (both,) = spots(Trials.of([trial("clip", 1, 20.0, clients=two, bounds=[bound(0.1), bound(0.01, client=1)])]))
    assert both.bound == pytest.approx(40)
    (one,) = spots(Trials.of([trial("clip", 1, 20.0, clients=two, bounds=[bound(0.1)])]))
    assert one.bound is None
    (vacuous,) = spots(Trials.of([trial("noise:sigma=1e-3", 1, 20.0, bounds=[bound(1e-80)])]))
    assert vacuous.bound is None  # 1600 dB: rounding alone keeps it


def test_maps_have_a_row_a_defence_and_a_column_a_batch_size() -> None:
    (drawn,) = heat_maps(spots(grid()))
    assert drawn.setting == "photos:width=8"
    assert drawn.batches == [1, 2]
    shown = {defence: [spot and spot.words for spot in row] for defence, row in drawn.rows}
    assert shown == {
        "none": ["1 of 1", "2 of 2"],
        "noise:sigma=0.01": ["0 of 1", "0 of 2"],
        "noise:sigma=0.1": ["failed", "not tested"],
        "clip:norm=1, noise:sigma=0.1": [None, "0 of 2"],
        "clip:norm=1": ["not run", None],
    }


def test_a_map_of_which_nothing_is_known_is_a_sentence() -> None:
    (drawn,) = heat_maps(spots(Trials.of([trial("clip", 2, words="no memory was left."), trial("noise", 2)])))
    assert drawn.untold == "Nothing is known of these 2 places of the grid: 1 failed, 1 not tested."
    assert all(not drawn.untold for drawn in heat_maps(spots(grid())))


def test_what_is_not_usual_about_an_audit_has_a_map_of_its_own() -> None:
    names = ["digits:batch=4", "digits:width=16,batch=4", "digits:batch=4,width=16"]
    told = [setting_of(Trial(key="0", configuration={"case": name})) for name in names]
    assert told == ["digits", "digits:width=16", "digits:width=16"]
    other = {
        "model": "nets:small",
        "data": "faces.npz",
        "batch": "4",
        "seed": ["1"],
        "knows": ["labels"],
        "budget": "2",
    }
    assert setting_of(Trial(key="0", configuration=other)) == "nets:small on faces.npz, knows labels"


def test_a_curve_follows_the_number_that_varies() -> None:
    held = spots(grid())
    assert [name for name, _ in of_one_number(held)] == ["noise:sigma=·"] * 1
    (one, two) = strength_curves(held)
    assert [(c.name, c.batch, c.metric) for c in (one, two)] == [
        ("noise:sigma=·", 1, "psnr"),
        ("noise:sigma=·", 2, "psnr"),
    ]
    assert [dot.strength for dot in one.dots] == ["none", "0.01", "0.1"]
    assert "none: best 131.0 dB, chance 11.5 dB" in one.dots[0].words
    assert "no attacker above 40.0 dB" in one.dots[1].words
    assert one.dots[2].words == "0.1: no attack returned anything"
    assert one.dots[2].score is None, "what failed is no score of zero"
    assert one.lines("score") == [], "an undefended client is no strength of the defence"
    assert (one.axis.high, one.axis.bend, one.cut) == (180, 60, False)
    assert one.ticks == two.ticks, "curves of one metric have one axis"
    assert one.dots[0].score is not None
    assert one.dots[1].score is not None
    assert one.dots[0].score < one.dots[1].score < 168, "up is nearer"


def test_of_several_numbers_the_one_with_most_values_is_the_strength() -> None:
    names = [f"clip:norm={c},noise:sigma={s}" for c in (1, 2) for s in (0.1, 1e-3, 1)]
    held = spots(Trials.of([trial(name, 2, 20.0, 20.0) for name in names]))
    assert [(name, [number for number, _ in along]) for name, along in of_one_number(held)] == [
        ("clip:norm=1,noise:sigma=·", ["0.001", "0.1", "1"]),
        ("clip:norm=2,noise:sigma=·", ["0.001", "0.1", "1"]),
    ]


def test_what_changed_is_told_of_the_last_run_but_one() -> None:
    last = [
        trial("", 1, 20.0, created="2026-01-01"),
        trial("", 2, 20.0, 20.0, created="2025-01-01"),
        trial("", 2, 15.0, 15.0, created="2026-01-01"),
        trial("clip", 2, 15.0, 15.0, created="2026-01-01"),
        trial("noise", 2, 15.0, 15.0, created="2026-01-01"),
    ]
    now = [
        trial("", 1, 131.0, created="2026-02-01"),
        trial("", 2, 20.0, 20.0, created="2026-02-01"),
        trial("clip", 2, 15.2, 15.0, created="2026-02-01"),
        trial("noise", 2, words="no memory was left.").model_copy(update={"created": "2026-02-01"}),
        trial("prune", 2, 15.0, 15.0, created="2026-02-01"),
    ]
    told = {change.now.title.partition(", attack")[0]: change for change in changes(Trials.of([*last, *now]))}
    assert [(title, change.differs, change.direction[1]) for title, change in told.items()] == [
        ("photos:batch=1,width=8", True, "more came back"),
        ("photos:batch=2,width=8", True, "nearer"),
        ("photos:batch=2,width=8, defence clip", False, "nearer"),
        ("photos:batch=2,width=8, defence noise", True, "failed now"),
    ]
    assert told["photos:batch=1,width=8"].words == ("1 recognisably, best 20.0 dB", "1 exactly, best 131.0 dB")
    page = Page(comparison_page(Trials.of([*last, *now])))
    assert page.row("photos:batch=2,width=8, defence noise, attack bias-ratio")[2].startswith(
        "failed: no memory was left."
    )
    assert "1 of 4 configurations that were run before came out as before." in page.text


def test_the_headline_counts_what_came_back_and_where() -> None:
    assert (
        headline(spots(grid())) == "3 of 8 private examples came back, at 2 of 5 places of the grid that were tested."
    )
    safe = Trials.of([trial("clip", 2, 15.0, 15.0)])
    assert (
        headline(spots(safe)) == "None of 2 private examples came back, at the one place of the grid that was tested."
    )


GRIDS = [
    grid(),
    Trials.of([trial("clip", 2, words="no memory was left.")]),
    Trials.of([trial("clip", 2, 20.0, 20.0)]),
    Trials.of([Trial.of(an_audit(case=EVIL, defences=[EVIL]))]),
    Trials.of([Trial.of(an_audit(truth=False, clients=[], metrics={}, runs=[run("unmix", [])]))]),
]
every = pytest.mark.parametrize("trials", GRIDS, ids=["grid", "failed", "one", "hostile", "captured"])


@every
def test_the_page_stands_alone_and_can_be_read_by_everyone(trials: Trials) -> None:
    text = comparison_page(trials)
    page = Page(text)
    assert not page.open
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(key, "#").startswith(("#", "data:text/csv;base64,")), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "script", "img")
        assert not any(key.startswith("on") for key in attributes)
    assert "default-src 'none'" in text
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")} <= set(names)
    assert all(a.get("aria-label") for a in page.all("svg") if a.get("aria-hidden") != "true")
    assert "None" not in page.text.replace("None of", "").replace("None found", "")


@every
def test_the_page_shows_no_private_example(trials: Trials) -> None:
    page = Page(comparison_page(trials))
    (held,) = [a["href"] for a in page.all("a") if a.get("download")]
    rows = list(csv.DictReader(StringIO(b64decode(held.partition(",")[2]).decode())))
    assert len(rows) == len(trials.rows())
    assert "label" not in rows[0]
    assert "cat" not in page.text
    assert "image/png" not in b64decode(held.partition(",")[2]).decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [None, 390])
def test_a_browser_shows_it_at_any_width_and_asks_nobody(width: int | None, tmp_path: Path) -> None:
    seen = probe(comparison_page(grid()), tmp_path, width=width)
    assert seen["requests"] == []
    assert seen["width"] <= seen["view"]
    assert seen["headline"].startswith("3 of 8 private examples")


def test_the_command_writes_the_page_of_folders_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    an_audit(fingerprint="1" * 64).save(tmp_path / "one" / "audit.json")
    an_audit(fingerprint="2" * 64, case="photos:batch=4", created="2026-02-02T03:04:05+00:00").save(
        tmp_path / "two.json"
    )
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "one"), str(tmp_path / "two.json"), "--out", str(tmp_path / "page.html")])
    assert not ended.value.code
    assert "2 of 4 private examples came back" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text())
    assert page.row("photos", "none", "2")[3] == "2 of 4"  # two exchanges
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "nothing")])
    assert "cannot read" in capsys.readouterr().err
