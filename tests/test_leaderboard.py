from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradleak.board import flags
from gradleak.board.leaderboard import attack_board, boards, compute_board, defense_board, pareto_board
from gradleak.board.results import AXES, UNSUITED, Results, read
from gradleak.board.store import CellResult, ImageRow, Store
from gradleak.errors import GradleakError

FAMILIES = {"dlg": "optimisation", "ig": "optimisation", "linear-leakage": "analytic"}
NOISE = np.random.default_rng(0).normal(size=16)


def cell(
    psnr: Sequence[float] | None,
    attack: str = "dlg",
    defense: str = "noise",
    model: str = "mlp",
    dataset: str = "digits",
    setting: str = "default",
    knowledge: str = "oblivious",
    seed: int = 0,
    batch_size: int = 1,
    victims: int = 16,
    options: dict[str, Any] | None = None,
    row: dict[str, Any] | None = None,
    **facts: Any,
) -> CellResult:
    """A cell with one PSNR an image, NaN for a diverged trial, or no rows at all for a failed cell."""
    config = {
        "attack": {"name": attack, "label": attack, "options": options or {}},
        "defense": {"name": defense, "label": defense, "options": {}},
        "model": {"name": model, "label": model, "options": {}},
        "dataset": {"name": dataset, "label": dataset, "options": {}, "digest": "0123456789"},
        "setting": {"name": setting, "batch_size": batch_size, "grants": {"defense": knowledge}},
        "knowledge": knowledge,
        "victims": victims,
        "seed": seed,
        "suite": {"name": "synthetic", "version": 2},
    }
    rows = [
        ImageRow(
            victim=place // batch_size,
            image=place % batch_size,
            status="diverged" if math.isnan(value) else "ok",
            psnr=value,
            ssim=value / 50,
            mse=10 ** (-value / 10),
            reidentified=value > 18,
            **{"loss": 1.0, "loss_at_truth": 1.0, **(row or {})},
        )
        for place, value in enumerate(psnr if psnr is not None else ())
    ]
    known: dict[str, Any] = {
        "attack_family": FAMILIES.get(attack, "control"),
        "defense_family": "none" if defense == "none" else "noise",
        "adaptive": True,
    }
    return CellResult(
        key=hashlib.sha256(json.dumps(config).encode()).hexdigest(),
        config=config,
        status="failed" if psnr is None else "ok",
        rows=rows,
        provenance={} if psnr is None else known | facts,
    )


def about(mean: float, spread: float = 1.0) -> list[float]:
    """Sixteen values of the given mean, the same victims easy and hard in every cell."""
    values: list[float] = (mean + spread * (NOISE - NOISE.mean())).tolist()
    return values


def floor(mean: float = 10, **labels: Any) -> CellResult:
    return cell(about(mean), attack="mean-image", **labels)


class Fixture:
    """Makes results of cells through a real store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made = itertools.count()

    def __call__(self, cells: Iterable[CellResult]) -> Results:
        with Store(self.folder / f"{next(self.made)}.sqlite", create=True) as store:
            for each in cells:
                store.write(each)
            return read(store)


@pytest.fixture
def results_of(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


def line(table: pd.DataFrame, **labels: str) -> dict[str, Any]:
    for name, label in labels.items():
        table = table[table[name] == label]
    (found,) = table.to_dict("records")
    return {str(name): value for name, value in found.items()}


# Defense board


def test_the_worst_case_names_its_attack_and_leaves_oracles_out(results_of: Fixture) -> None:
    found = defense_board(
        results_of(
            [
                floor(12),
                cell(about(5), attack="random-image"),
                cell(about(20), attack="dlg"),
                cell(about(18), attack="ig"),
                cell(about(25), attack="ig", knowledge="public"),
                cell(about(40), attack="ig", knowledge="oracle"),
                cell(about(30), attack="random-image", defense="none"),
                cell(about(28), attack="dlg", defense="none"),
            ]
        )
    ).table
    noise = line(found, defense="noise")
    assert noise["psnr"] == pytest.approx(25)
    assert (noise["psnr_attack"], noise["psnr_knowledge"]) == ("ig", "public")
    assert noise["psnr_oblivious"] == pytest.approx(20) and noise["psnr_oblivious_attack"] == "dlg"
    assert noise["psnr_adaptive"] == pytest.approx(25) and noise["psnr_adaptive_attack"] == "ig"
    assert noise["psnr_ceiling"] == pytest.approx(40)
    assert noise["psnr_floor"] == pytest.approx(12) and noise["above"] == pytest.approx(13)
    assert noise["psnr_median"] == pytest.approx(np.median(about(25)))
    assert noise["psnr_q95"] == pytest.approx(np.quantile(about(25), 0.95))
    assert noise["psnr_best"] == pytest.approx(max(about(25)))


def test_no_defense_stands_below_the_best_guess(results_of: Fixture) -> None:
    cells = [floor(12), cell(about(14), attack="random-image"), cell(about(9)), cell(about(11), attack="ig")]
    noise = line(defense_board(results_of(cells)).table, defense="noise")
    assert noise["psnr"] == noise["psnr_floor"] == pytest.approx(14)
    assert noise["psnr_attack"] == "random-image"
    assert (noise["above"], noise["above_low"], noise["standing"]) == (0, 0, "at the floor")


def test_a_control_that_failed_is_no_floor(results_of: Fixture) -> None:
    broken = [math.nan, *about(14)[1:]]
    for failed in (cell(None, attack="random-image"), cell(broken, attack="random-image")):
        noise = line(defense_board(results_of([floor(12), failed, cell(about(20))])).table, defense="noise")
        assert noise["psnr_floor"] == pytest.approx(12) and noise["doubt"].startswith("failed")
    alone = line(defense_board(results_of([cell(None, attack="mean-image"), cell(about(20))])).table, defense="noise")
    assert math.isnan(alone["psnr_floor"]) and alone["standing"] == "no floor" and alone["rank_low"] is None


def test_a_control_counts_for_every_defense_of_its_context(results_of: Fixture) -> None:
    cells = [floor(8), floor(8, defense="b"), cell(about(15), attack="generator-sample", defense="b")]
    cells += [cell(about(12)), cell(about(12), defense="b"), cell(about(40), attack="random-image", dataset="photos")]
    found = defense_board(results_of(cells)).table
    assert found["psnr_floor"].tolist() == pytest.approx([15, 15])


def test_what_attacks_do_not_lead_above_the_floor_is_one_tied_group(results_of: Fixture) -> None:
    leaks = {"z": 10.1, "y": 9.0, "c": 5.0, "open": 30.0, "half": 20.0}
    cells = [
        each for name, mean in leaks.items() for each in (floor(10, defense=name), cell(about(mean), defense=name))
    ]
    board = defense_board(results_of([*cells, *[cell(about(5), defense=n, knowledge="public") for n in leaks]]))
    noisy = board.table
    assert noisy["defense"].tolist() == ["c", "y", "z", "half", "open"] or noisy["standing"][2] == ""
    held = noisy[noisy["standing"] == "at the floor"]
    assert {"c", "y"} <= set(held["defense"]) and held["defense"].tolist() == sorted(held["defense"])
    assert set(zip(held["rank_low"], held["rank_high"], strict=True)) == {(1, len(held))}
    assert noisy.loc[noisy["defense"] == "open", "rank_low"].item() == 5
    assert board.strong == frozenset()


def test_one_image_recovered_exactly_is_not_the_floor(results_of: Fixture) -> None:
    lucky = [60.0, *[9.0] * 15]
    found = line(defense_board(results_of([floor(12), cell(lucky)])).table, defense="noise")
    assert found["above"] == 0 or found["above_low"] <= 0
    assert found["standing"] == "" and found["success_psnr_54"] == pytest.approx(1 / 16)


def test_exact_images_are_equal_however_exact(results_of: Fixture) -> None:
    cells = [floor(12), cell([100.0] * 16), floor(12, defense="b"), cell([60.0] * 16, defense="b")]
    found = defense_board(results_of(cells)).table
    assert found["psnr"].tolist() == [54, 54] and found["success_psnr_54"].tolist() == [1, 1]
    assert found[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 2], [1, 2]]
    # Sixteen victims prove no certainty.
    assert (found["psnr_low"] < 47).all() and (found["success_psnr_54_low"] < 0.85).all()


def test_a_row_that_faced_fewer_attacks_says_so_and_has_no_rank(results_of: Fixture) -> None:
    cells = [floor(10, defense=name) for name in ("all", "few", "excused")]
    cells += [cell(about(20), attack=attack, defense="all") for attack in FAMILIES]
    cells += [cell(about(15), attack=attack, defense="few") for attack in ("dlg", "ig")]
    cells += [cell(about(18), attack=attack, defense="excused") for attack in ("dlg", "ig")]
    reason = ("mlp", "digits", "default", "excused", "linear-leakage", "", "the first layer is not linear")
    found = replace(results_of(cells), unsuited=pd.DataFrame([reason], columns=list(UNSUITED)))
    board = defense_board(found)
    table = board.table.set_index("defense")
    assert table.loc["few", "standing"] == "2 of 3 attacks" and table.loc["few", "rank_low"] is pd.NA
    assert table.loc[["excused", "all"], "rank_low"].tolist() == [1, 2]
    assert board.table["defense"].tolist() == ["excused", "all", "few"]
    assert any("1 of 3 defenses faced fewer attacks" in note for note in board.notes)


def test_a_level_that_makes_no_difference_is_not_missed(results_of: Fixture) -> None:
    cells = [floor(10, defense=name) for name in ("noisy", "plain")]
    cells += [cell(about(20), attack="ig", defense="noisy", knowledge=level) for level in ("oblivious", "public")]
    cells += [cell(about(20), attack="ig", defense="plain", knowledge="oblivious")]
    cells += [cell(about(20), attack="dlg", defense=name, knowledge="public") for name in ("noisy", "plain")]
    found = results_of(cells)
    assert line(defense_board(found).table, defense="plain")["standing"] == "1 of 2 attacks"
    same = ("mlp", "digits", "default", "plain", "ig", "public", "the attack would do the same")
    found = replace(found, unsuited=pd.DataFrame([same], columns=list(UNSUITED)))
    assert line(defense_board(found).table, defense="plain")["rank_low"] == 1


def test_an_attack_on_fewer_victims_or_seeds_is_not_faced(results_of: Fixture) -> None:
    both = [floor(seed=seed) for seed in (0, 1)] + [floor(defense="b", seed=seed) for seed in (0, 1)]
    both += [cell(about(20), defense="b", seed=seed) for seed in (0, 1)] + [cell(about(20))]
    noise = line(defense_board(results_of(both)).table, defense="noise")
    assert noise["standing"] == "0 of 1 attacks" and "victims" in noise["doubt"]


def test_a_defense_whose_strong_attacks_failed_is_not_evaluated(results_of: Fixture) -> None:
    def broken(count: int, mean: float) -> list[float]:
        return [math.nan] * count + about(mean)[count:]

    base = [floor(10), floor(10, defense="none"), cell(about(30), defense="none"), cell(about(12), attack="ig")]
    base.append(cell(about(12), attack="ig", defense="none"))
    one = line(defense_board(results_of([*base, cell(broken(1, 20))])).table, defense="noise")
    assert one["standing"] == "" and "failed" in one["doubt"].split()
    two = line(defense_board(results_of([*base, cell(broken(2, 20))])).table, defense="noise")
    assert two["standing"] == "not evaluated" and pd.isna(two["rank_low"])


@pytest.mark.parametrize(("unread", "doubt"), [(1, ""), (2, "fit")])
def test_images_that_the_strongest_attack_did_not_read_are_a_doubt(
    unread: int, doubt: str, results_of: Fixture
) -> None:
    values = [54.0] * (16 - unread) + [20.0] * unread
    cells = [floor(10), cell(values, knowledge="public", row={"loss": 5.0, "loss_at_truth": 0.1})]
    cells += [floor(10, defense="none"), cell(about(40), defense="none")]
    assert line(defense_board(results_of(cells)).table, defense="noise")["doubt"] == doubt


def test_doubtful_rows_are_never_first(results_of: Fixture) -> None:
    stuck = {"loss": 5.0, "loss_at_truth": 0.1}
    falling = {"late_progress": 0.4}
    cells = []
    for name, mean, row in (("stuck", 11.0, stuck), ("falling", 12.0, falling), ("sound", 15.0, {})):
        cells += [floor(10, defense=name), cell(about(mean), defense=name, row=row, knowledge="public")]
    cells += [floor(10, defense="none"), cell(about(40), defense="none")]
    board = defense_board(results_of(cells))
    doubts = board.table.set_index("defense")["doubt"].to_dict()
    assert doubts == {"stuck": "fit", "falling": "budget", "sound": "", "none": ""}
    assert board.table.set_index("defense")["rank_high"].to_dict()["stuck"] == 4
    assert board.strong == frozenset()
    assert {note.split(":")[0] for note in board.notes} >= {"doubt fit", "doubt budget"}
    # Where images were recovered there is nothing to doubt.
    open_ = [floor(10), cell(about(40), row=stuck, knowledge="public")]
    assert defense_board(results_of(open_)).table["doubt"].tolist() == [""]


def test_axes_have_their_own_worst_cases(results_of: Fixture) -> None:
    sharp = cell(about(20), attack="dlg", row={"lpips": 0.5})
    alike = cell(about(15), attack="ig", row={"lpips": 0.1})
    found = line(defense_board(results_of([floor(), sharp, alike])).table, defense="noise")
    assert (found["psnr_attack"], found["lpips_attack"]) == ("dlg", "ig")
    assert found["lpips"] == pytest.approx(0.1)
    assert found["success_lpips_0.2"] == 1 and found["success_psnr_30"] == 0
    assert math.isnan(found["ms_ssim"]) and found["ms_ssim_attack"] == ""


def test_every_interval_holds_its_estimate(results_of: Fixture) -> None:
    defenses = ("none", "noise", "top-k")
    random = np.random.default_rng(1)
    cells = [
        cell(random.normal(20, 5, 16).tolist(), attack=attack, defense=defense, dataset=dataset)
        for attack, defense, dataset in itertools.product((*FAMILIES, "mean-image"), defenses, ("digits", "photos"))
    ]
    for board in boards(results_of(cells), by_context=True, ratings=True):
        columns = {str(name) for name in board.table.columns}
        measured = {name for name in columns if {f"{name}_low", f"{name}_high"} <= columns}
        assert "above" in measured
        for name in measured:
            known = board.table[board.table[name].notna()]
            assert (known[f"{name}_low"] <= known[name] + 1e-9).all()
            assert (known[f"{name}_high"] >= known[name] - 1e-9).all()


def test_pooling_takes_the_worst_case_in_each_context(results_of: Fixture) -> None:
    pooled = results_of(
        [
            *(floor(dataset=dataset) for dataset in ("digits", "photos")),
            cell(about(30), attack="dlg", dataset="digits"),
            cell(about(10), attack="ig", dataset="digits"),
            cell(about(10), attack="dlg", dataset="photos"),
            cell(about(20), attack="ig", dataset="photos"),
        ]
    )
    found = line(defense_board(pooled).table, defense="noise")
    assert found["psnr"] == pytest.approx(25)
    assert found["psnr_attack"] == "dlg 1, ig 1"
    assert found["victims"] == 32 and found["contexts"] == 2
    photos = line(defense_board(pooled.where(dataset="photos")).table, defense="noise")
    assert photos["psnr"] == pytest.approx(20) and photos["psnr_attack"] == "ig"
    with pytest.raises(GradleakError, match=r"unknown dataset 'photo'; did you mean 'photos'"):
        pooled.where(dataset="photo")


def test_seeds_of_a_victim_make_one_cluster(results_of: Fixture) -> None:
    # Twice the same numbers tell no more than once: the interval must not shrink.
    once = defense_board(results_of([floor(), cell(about(20, 5))])).table
    twice = defense_board(results_of([floor(), floor(seed=1), cell(about(20, 5)), cell(about(20, 5), seed=1)])).table
    names = ["psnr", "psnr_low", "psnr_high"]
    assert twice[names].to_numpy() == pytest.approx(once[names].to_numpy())
    assert twice["seeds"].tolist() == [2] and twice["trials"].tolist() == [32]


def test_images_of_a_batch_make_one_cluster(results_of: Fixture) -> None:
    images = np.repeat(about(20, 5), 4).tolist()
    single = defense_board(results_of([cell(about(20, 5))])).table
    batched = defense_board(results_of([cell(images, batch_size=4)])).table
    names = ["psnr", "psnr_low", "psnr_high", "reidentified_low"]
    assert batched[names].to_numpy() == pytest.approx(single[names].to_numpy())


def test_a_failed_trial_scores_the_paired_control(results_of: Fixture) -> None:
    broken = about(20)
    broken[3] = math.nan
    found = results_of([floor(8), cell(about(11), attack="random-image"), cell(broken)])
    scored = found.rows[(found.rows["attack"] == "dlg") & found.rows["failed"]]
    # The better of the two controls, on that very victim, on every metric.
    assert scored["psnr"].tolist() == pytest.approx([about(11)[3]])
    assert scored["ssim"].tolist() == pytest.approx([about(11)[3] / 50])
    assert scored["lpips"].isna().all()
    board = line(defense_board(found).table, defense="noise")
    assert board["failed"] == 1 and board["trials"] == 16
    expected = [about(11)[3] if place == 3 else value for place, value in enumerate(about(20))]
    assert board["psnr"] == pytest.approx(np.mean(expected))


def test_a_failed_cell_counts_every_victim(results_of: Fixture) -> None:
    found = results_of([floor(8), cell(about(20)), cell(None, seed=1)])
    board = line(defense_board(found).table, defense="noise")
    assert (board["trials"], board["failed"], board["seeds"]) == (32, 16, 2)
    assert board["psnr"] == pytest.approx((20 + 8) / 2)
    # A failed control does not turn into an attack.
    both = results_of([floor(8), cell(None, attack="mean-image", seed=1), cell(about(20))])
    assert attack_board(both).table["control"].tolist() == [False, True]


def test_without_a_control_failures_score_the_worst_end_of_the_scale(results_of: Fixture) -> None:
    board = defense_board(results_of([cell([math.nan] * 15 + [32.0])]))
    assert board.table["psnr"].tolist() == [2]
    assert board.table["psnr_floor"].isna().all()
    assert any("no control was run" in note for note in board.notes)


def test_the_badge_needs_an_attack_that_uses_what_it_knows(results_of: Fixture) -> None:
    found = defense_board(
        results_of(
            [
                cell(about(20), defense="none"),
                cell(about(20), defense="oblivious-only"),
                cell(about(20), defense="control-only"),
                cell(about(20), defense="control-only", attack="mean-image", knowledge="public"),
                cell(about(20), defense="blind", knowledge="public", adaptive=False),
                cell(about(20), defense="oracle-only"),
                cell(about(20), defense="oracle-only", knowledge="oracle"),
                cell(about(20), defense="tested", knowledge="parameters"),
                cell(about(20), defense="half"),
                cell(about(20), defense="half", knowledge="public"),
                cell(about(20), defense="half", dataset="photos"),
            ]
        )
    ).table
    badged = set(found.loc[found["doubt"].str.contains("adaptive"), "defense"])
    assert badged == {"oblivious-only", "control-only", "blind", "oracle-only", "half"}


def test_lists_of_several_batch_sizes_widen_what_spans_them(results_of: Fixture) -> None:
    images = np.random.default_rng(3).normal(20, 5, 64)
    blocks = np.repeat(images.reshape(16, 4).mean(axis=1), 4)
    one = cell(images[:16].tolist(), setting="single")
    four = cell(blocks.tolist(), setting="batch", batch_size=4)
    elsewhere = cell(blocks.tolist(), setting="batch", batch_size=4, dataset="photos")
    both, apart = results_of([one, four]), results_of([one, elsewhere])
    # Columns of the lists side by side: victims 0 to 15 of digits/1, then 16 to 31 of digits/4.
    assert sorted(map(tuple, both.panel.overlaps.tolist())) == [(image, 16 + image // 4) for image in range(16)]
    assert len(apart.panel.overlaps) == 0 and len(both.where(setting="batch").panel.overlaps) == 0
    wide, narrow = (line(defense_board(each).table, defense="noise") for each in (both, apart))
    assert wide["psnr"] == pytest.approx(narrow["psnr"])
    assert wide["psnr_high"] - wide["psnr_low"] > 1.03 * (narrow["psnr_high"] - narrow["psnr_low"])
    assert any("share images" in note for note in defense_board(both).notes)
    assert not any("share images" in note for note in defense_board(apart).notes)


def test_worst_cases_over_unequal_victims_are_flagged(results_of: Fixture) -> None:
    cells = [floor(), cell(about(20)), cell(about(40)[:4], attack="ig", victims=4)]
    cells += [floor(defense="fair"), cell(about(20), defense="fair"), cell(about(15), defense="fair", attack="ig")]
    # A timeout is a victim like any other.
    cells += [floor(defense="slow"), cell([math.nan, *about(20)[1:]], defense="slow")]
    board = defense_board(results_of(cells))
    badged = board.table.set_index("defense")["doubt"].to_dict()
    assert badged == {"noise": "adaptive victims", "fair": "adaptive", "slow": "failed adaptive"}
    assert any(note.startswith("doubt victims: ") for note in board.notes)


def test_prices_and_guarantees(results_of: Fixture) -> None:
    weak = {"epsilon": 8.0, "delta": 1e-5, "accountant": "rdp", "unit": "one example"}
    cells = [
        cell(about(20), bytes=100, test_accuracy=0.5, epsilon={**weak, "epsilon": 2.0}),
        cell(about(20), bytes=300, test_accuracy=0.7, epsilon=weak, dataset="photos"),
        cell(about(30), defense="none", bytes=900, test_accuracy=0.9, epsilon=None),
    ]
    found = defense_board(results_of(cells))
    noise = line(found.table, defense="noise")
    assert (noise["bytes"], noise["epsilon"], noise["accountant"]) == (200, 8, "rdp")
    assert noise["test_accuracy"] == pytest.approx(0.6)
    assert math.isnan(line(found.table, defense="none")["epsilon"])
    assert any("delta 1e-05, rdp, neighbours: one example" in note for note in found.notes)
    # Where one context has no guarantee, there is none for all of them together.
    cells[1] = cell(about(20), epsilon=None, dataset="photos")
    assert math.isnan(line(defense_board(results_of(cells)).table, defense="noise")["epsilon"])


def test_equal_labels_with_other_options_are_told_apart(results_of: Fixture) -> None:
    found = results_of(
        [cell(about(20), options={"lr": 1.0, "steps": 5}), cell(about(30), options={"lr": 2.0, "steps": 5})]
    )
    assert sorted(set(found.rows["attack"])) == ["dlg (lr=1.0)", "dlg (lr=2.0)"]
    # Knowledge of the defense is an axis of its own, not another setting.
    same = results_of([cell(about(20)), cell(about(20), knowledge="public")])
    assert set(same.rows["setting"]) == {"default"}


def test_equal_defenses_tie_and_nothing_stands_out(results_of: Fixture) -> None:
    found = defense_board(
        results_of(
            [floor(10, defense=defense) for defense in ("a", "b", "c")]
            + [cell(about(20), defense=defense, knowledge="public") for defense in ("a", "b")]
            + [cell(about(30), defense="c", knowledge="public")]
        )
    )
    assert found.table[["rank_low", "rank_high"]].to_numpy().tolist() == [[1, 2], [1, 2], [3, 3]]
    assert found.strong == frozenset()


def test_notes_state_the_protocol(results_of: Fixture) -> None:
    notes = "\n".join(defense_board(results_of([floor(), cell(about(20), seed=4), cell(about(9), defense="b")])).notes)
    for fact in ("synthetic 2", "16 of digits/1", "seeds: 0, 4", "95 % interval", "minimum detectable difference"):
        assert fact in notes
    assert "too narrow" not in notes
    few = defense_board(results_of([cell(about(20)[:15], victims=15)]))
    assert any("fewer than 16 victims" in note for note in few.notes)


def test_a_board_where_nothing_leaks_is_called_inconclusive(results_of: Fixture) -> None:
    weak = defense_board(results_of([floor(10, defense="none"), cell(about(10), defense="none")]))
    strong = defense_board(results_of([floor(10, defense="none"), cell(about(30), defense="none")]))
    assert any("inconclusive" in note for note in weak.notes)
    assert not any("inconclusive" in note for note in strong.notes)


# Attack board


def test_attacks_are_ranked_by_their_distance_to_the_floor(results_of: Fixture) -> None:
    random = np.random.default_rng(2)
    cells = [floor(10, defense=defense) for defense in ("a", "b")]
    for defense in ("a", "b"):
        cells += [
            cell((np.array(about(20)) + random.normal(size=16) * 0.1).tolist(), attack="dlg", defense=defense),
            cell((np.array(about(30)) + random.normal(size=16) * 0.1).tolist(), attack="ig", defense=defense),
            cell(
                (np.array(about(20)) + random.normal(size=16) * 0.1).tolist(), attack="linear-leakage", defense=defense
            ),
        ]
    board = attack_board(results_of(cells), ratings=True)
    table = board.table
    assert table["attack"][0] == "ig" and table["attack"][3] == "mean-image"
    assert table["above"].tolist() == pytest.approx([20, 10, 10, 0], abs=0.1)
    ranks = table[["rank_low", "rank_high"]].astype("float").to_numpy().tolist()
    assert ranks[:3] == [[1, 1], [2, 3], [2, 3]] and all(map(math.isnan, ranks[3]))
    assert board.strong == frozenset({0})
    assert table["rating"][0] > table["rating"][1] > 0 and math.isnan(table["rating"][3])
    assert table["success_psnr_20"][0] == 1 and table["success_psnr_20"][3] == 0


def test_attacks_are_compared_on_common_cells(results_of: Fixture) -> None:
    # The weaker attack skipped the hard defense, so that its own mean looks better.
    found = attack_board(
        results_of(
            [
                cell(about(30), attack="ig", defense="easy"),
                cell(about(10), attack="ig", defense="hard"),
                cell(about(28), attack="dlg", defense="easy"),
                floor(5, defense="easy"),
                floor(5, defense="hard"),
            ]
        )
    ).table
    assert line(found, attack="dlg")["above"] > line(found, attack="ig")["above"]
    assert (line(found, attack="ig")["rank_high"], line(found, attack="dlg")["rank_low"]) == (1, 2)
    assert (line(found, attack="dlg")["cells"], line(found, attack="dlg")["of_cells"]) == (1, 2)


def test_specialists_stand_apart_with_what_they_break(results_of: Fixture) -> None:
    names = ("a", "b", "c", "d", "e")
    cells = [each for name in names for each in (floor(10, defense=name), cell(about(20), defense=name))]
    cells += [cell(about(25), attack="ig", defense=name) for name in names[:3]]
    cells.append(cell(about(40), attack="linear-leakage", defense="e", row={"loss": 5.0, "loss_at_truth": 0.1}))
    cells.append(cell(about(11), attack="linear-leakage", defense="d", row={"loss": 5.0, "loss_at_truth": 0.1}))
    table = attack_board(results_of(cells)).table
    assert table["attack"].tolist() == ["ig", "dlg", "linear-leakage", "mean-image"]
    assert table["rank_low"].isna().tolist() == [False, False, True, True]
    special = line(table, attack="linear-leakage")
    assert special["breaks"] == "e" and special["sets"] == 1 and special["unfit"] == 1
    assert table["sets"].tolist() == [3, 1, 1, 0]


# Both


ATTACKED = list(itertools.product(("dlg", "ig", "mean-image"), ("oblivious", "public"), (0, 1)))


def attacked(defense: str, values: np.ndarray[Any, Any], spoilt: Mapping[int, str]) -> list[CellResult]:
    """The cells of a defense; a spoilt one is absent, failed, or lost its best victims to a timeout."""
    cells = []
    for place, (attack, knowledge, seed) in enumerate(ATTACKED):
        psnr = values[place].copy()
        if (how := spoilt.get(place)) == "absent":
            continue
        if how == "timeout":
            psnr[psnr.argsort()[-2:]] = math.nan
        rows = None if how == "failed" else psnr.tolist()
        cells.append(cell(rows, attack, defense, knowledge=knowledge, seed=seed, victims=len(psnr)))
    return cells


@given(
    st.integers(0, 2**32),
    st.dictionaries(st.integers(0, len(ATTACKED) - 1), st.sampled_from(["absent", "failed", "timeout"]), min_size=1),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_failing_never_pays(results_of: Fixture, seed: int, spoilt: dict[int, str]) -> None:
    random = np.random.default_rng(seed)
    means = random.choice([9.0, 11.0, 20.0, 50.0], size=(3, len(ATTACKED), 1))
    values = means + random.normal(size=(3, len(ATTACKED), 6))
    others = [each for place, name in enumerate("bc") for each in attacked(name, values[place + 1], {})]
    before, after = (defense_board(results_of([*others, *attacked("a", values[0], how)])).table for how in ({}, spoilt))
    if "a" not in set(after["defense"]):
        return
    was, now = (line(table, defense="a") for table in (before, after))
    ranked = now["standing"] in ("", "at the floor")
    if not ranked:
        assert pd.isna(now["rank_low"])
        return
    if now["doubt"]:
        assert {"failed", "adaptive", "victims"} & set(now["doubt"].split())
        assert now["rank_high"] == after["rank_low"].notna().sum()
        return
    assert now["psnr"] >= was["psnr"] - 1e-9 and now["rank_low"] >= was["rank_low"]


@given(st.permutations(range(8)))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_writing_and_reading_changes_nothing(results_of: Fixture, order: list[int]) -> None:
    random = np.random.default_rng(3)
    cells = [
        cell(random.normal(20, 5, 16).tolist(), attack=attack, defense=defense, knowledge=knowledge)
        for attack, defense, knowledge in itertools.product(("dlg", "mean-image"), ("a", "b"), ("oblivious", "public"))
    ]
    one, other = results_of(cells), results_of(cells[place] for place in order)
    for first, second in zip(boards(one), boards(other), strict=True):
        pd.testing.assert_frame_equal(first.table, second.table)
        assert (first.notes, first.strong) == (second.notes, second.strong)


def test_a_cell_in_two_stores_counts_once(tmp_path: Path) -> None:
    with Store(tmp_path / "one", create=True) as one, Store(tmp_path / "two", create=True) as two:
        for store in (one, two):
            store.write(floor())
        one.write(cell(None))
        two.write(cell(about(20)))
        found = read(one, two)
    assert len(found.cells) == 2 and set(found.cells["status"]) == {"ok"}
    assert len(found.rows) == 32


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with Store(tmp_path / "empty", create=True) as store, pytest.raises(GradleakError, match="holds no cell yet"):
        read(store)


def test_only_controls_make_an_empty_board(results_of: Fixture) -> None:
    found = results_of([floor()])
    assert len(defense_board(found).table) == 0
    assert "no attack has faced any defense yet" in defense_board(found).notes
    assert attack_board(found, ratings=True).table["attack"].tolist() == ["mean-image"]


def test_trade_offs_mark_what_nothing_beats(results_of: Fixture) -> None:
    cells = [
        cell(about(30), defense="none", bytes=100, test_accuracy=0.9),
        cell(about(15), defense="good", bytes=100, test_accuracy=0.9),
        cell(about(12), defense="safe", bytes=100, test_accuracy=0.5),
        cell(about(20), defense="small", bytes=10, test_accuracy=0.9),
    ]
    cells += [floor(10, defense=defense) for defense in ("none", "good", "safe", "small")]
    table = pareto_board(defense_board(results_of(cells))).table
    assert set(table.loc[table["front"], "defense"]) == {"good", "safe", "small"}
    spent = [cell(about(20), attack="dlg", row={"gradient_evaluations": 10}), floor()]
    spent += [cell(about(15), attack="ig", row={"gradient_evaluations": 20})]
    compute = compute_board(attack_board(results_of(spent))).table
    assert compute["attack"].tolist() == ["dlg", "ig"] and compute["front"].tolist() == [True, False]


# Flags: each is raised by a constructed case and silent on a sound one


def raised(results: Results) -> set[str]:
    return {flag.flag for flag in flags.flags(results)}


def sound(**facts: Any) -> list[CellResult]:
    """A defense that an attack broke, with and without knowledge of it, to the end of its loss."""
    row = {"loss": 0.11, "loss_at_truth": 0.1, "message_norm": 3.0, "late_progress": 0.001}
    return [
        floor(),
        cell(about(20), row=row, **facts),
        cell(about(25), knowledge="public", row=row, **facts),
        cell(about(22), attack="linear-leakage", row={"message_norm": 3.0}, **facts),
    ]


def test_sound_results_raise_no_flag(results_of: Fixture) -> None:
    found = results_of(sound(stochastic=True))
    assert raised(found) == set()
    board = flags.flag_board(found)
    assert len(board.table) == 0 and board.notes == ("no flag raised",)


def test_randomness_without_an_adaptive_answer_is_flagged(results_of: Fixture) -> None:
    assert raised(results_of([floor(), cell(about(20), stochastic=True)])) == {"randomness unanswered"}
    assert raised(results_of([floor(), cell(about(20), stochastic=False)])) == set()
    bare = [floor(defense="none"), cell(about(20), defense="none", stochastic=True)]
    assert raised(results_of(bare)) == set()


def test_an_attack_that_did_not_fit_is_flagged(results_of: Fixture) -> None:
    stuck = {"loss": 5.0, "loss_at_truth": 0.1}
    (flag,) = flags.flags(results_of([floor(), cell(about(11), row=stuck)]))
    assert flag.flag == "attack did not fit"
    assert flag.where == "dlg against noise on mlp · digits · default"
    assert "5 at its answer, 0.1 at the truth" in flag.why
    # Images that were found prove that it fitted well enough, and a negative loss is no excuse.
    assert raised(results_of([floor(), cell(about(25), row=stuck)])) == set()
    assert raised(results_of([floor(), cell(about(11), row={"loss": -1.0, "loss_at_truth": -9.0})])) == set()
    assert raised(results_of([floor(), cell(about(11), row={"loss": 9.0, "loss_at_truth": -9.0})])) != set()


def test_a_network_that_does_not_look_is_flagged(results_of: Fixture) -> None:
    (flag,) = flags.flags(results_of([floor(), cell(about(20), row={"contrast": 7e-4})]))
    assert flag.flag == "flat landscape" and "0.0007" in flag.why and "mlp · digits · default" in flag.where
    assert raised(results_of([floor(), cell(about(20), row={"contrast": 0.1})])) == set()


def test_rows_say_how_far_a_loss_fell(results_of: Fixture) -> None:
    half = {"loss": 3.0, "loss_at_truth": 1.0, "loss_at_mean": 5.0, "contrast": 0.2}
    (found,) = defense_board(results_of([floor(), cell(about(20), row=half)])).table.to_dict("records")
    assert (found["fit"], found["contrast"]) == (pytest.approx(0.5), pytest.approx(0.2))
    (found,) = defense_board(results_of([floor(), cell(about(20), row={**half, "loss_at_mean": 0.5})])).table.to_dict(
        "records"
    )
    assert math.isnan(found["fit"])


def test_an_attack_that_models_another_update_is_flagged(results_of: Fixture) -> None:
    wrong = {"loss": 0.1, "loss_at_truth": 5.0}
    assert raised(results_of([floor(), cell(about(15), row=wrong)])) == {"truth is no minimum"}
    # Perfect images make both losses rounding errors.
    tiny = {"loss": 1e-15, "loss_at_truth": 1e-11}
    assert raised(results_of([floor(), cell(about(60), row=tiny)])) == set()
    # An attacker that knows the noise fits it: that is protection, not a mistake.
    known = cell(about(11), row=wrong, knowledge="public", stochastic=True)
    assert raised(results_of([floor(), known])) == set()


def test_weaker_knowledge_that_wins_is_flagged(results_of: Fixture) -> None:
    better = [floor(), cell(about(25)), cell(about(20), knowledge="public")]
    (flag,) = flags.flags(results_of(better))
    assert flag.flag == "weaker knowledge wins" and "5.0 dB better with knowledge 'oblivious'" in flag.why
    chance = (np.array(about(20)) + np.where(np.arange(16) % 2, 4, -4)).tolist()
    assert raised(results_of([floor(), cell(about(20.2)), cell(chance, knowledge="public")])) == set()
    assert raised(results_of([floor(), cell(about(20.2)), cell(about(20), knowledge="public")])) == set()


def test_optimisation_that_misses_what_a_closed_form_finds_is_flagged(results_of: Fixture) -> None:
    closed = cell(about(40), attack="linear-leakage")
    assert raised(results_of([floor(), closed, cell(about(11)), cell(about(10), attack="ig")])) == {
        "optimisation fails"
    }
    assert raised(results_of([floor(), closed, cell(about(11)), cell(about(20), attack="ig")])) == set()
    assert raised(results_of([floor(), closed])) == set()


def test_an_empty_message_is_flagged(results_of: Fixture) -> None:
    (flag,) = flags.flags(results_of([floor(), cell(about(20), row={"message_norm": 0.0})]))
    assert flag.flag == "degenerate message" and flag.why.startswith("100 %")


def test_leakage_that_rises_with_the_budget_is_flagged(results_of: Fixture) -> None:
    def ladder(*gains: float) -> Results:
        return results_of(
            [
                floor(),
                *(
                    cell(about(20 + gain), options={"iterations": 100 * 2**place, "lr": 1.0})
                    for place, gain in enumerate(gains)
                ),
            ]
        )

    (flag,) = flags.flags(ladder(0, 2, 5))
    assert flag.flag == "budget-limited" and "3.0 dB more" in flag.why and "iterations=400" in flag.where
    assert raised(ladder(0, 5, 5.1)) == set()
    late = {"late_progress": 0.4}
    (flag,) = flags.flags(results_of([floor(), cell(about(20), row=late)]))
    assert flag.flag == "budget-limited" and "40 % of the loss's fall" in flag.why
    assert raised(results_of([floor(), cell(about(50), row=late)])) == set()


def test_all_axes_are_measured_columns(results_of: Fixture) -> None:
    table = defense_board(results_of(sound())).table
    for axis in AXES:
        assert {axis, f"{axis}_low", f"{axis}_high", f"{axis}_attack", f"{axis}_floor"} <= set(table.columns)
