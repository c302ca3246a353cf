"""The audit itself: attackers, attacks and defenses in turn, within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import registry
from ..board.provenance import Provenance
from ..board.store import Store, victim_list
from ..errors import GradleakError
from ..evaluation.evaluate import evaluate
from ..suite import AttackCell, Utility
from ..suite.parts import members
from . import plan, report
from .plan import ATTACKERS, Bench, Clock, Ran
from .report import Audit, Exposed, Finding, Remedy
from .request import Guard, Request, Tell, taking

_SEARCH, _REMEDIES = 0.25, 0.4
"""Shares of the budget: of the first search of each attacker, which has to come to its end for the audit to say
anything, and of all defenses together."""
_PERFECT = 40.0
"""Mean PSNR in dB above which nothing more can come back that anybody would see."""
_SHOWN = 3
"""Images of the report, those that came back best."""
_PREFERRED = ("dp-sgd", "gaussian-noise", "secure-aggregation", "sign", "top-k", "gradient-noise", "quantise")
"""Defenses that are tried first."""


@taking(Request)
def audit(request: Request) -> Audit:
    """Attack one's own training with everything of `auto-v2` that can run, and say what came back.

    Half of the data is public; clients are made of the private half. Attackers in turn (see `plan.ATTACKERS`), attacks
    in turn, then, if anything came back, the defenses of the registry against the strongest attacks, each with the
    accuracy that it leaves. It takes what a `Request` is made of: `audit(model, data, batch_size=8, budget=60)`.

    Raises:
        GradleakError: model, data and client do not fit each other, or the budget is none.
    """
    if not request.budget > 0:
        raise GradleakError(f"budget: {request.budget} (allowed: seconds above 0)")
    clock = Clock(request.budget)
    bench = request.bench()
    opened = None if request.store is None else Store(request.store, create=True)
    try:
        return _Auditor(bench, request.guard, clock, opened, request.told).audit(request.remedies)
    finally:
        if opened is not None:
            opened.close()


@dataclass
class _Auditor:
    """One audit under way."""

    bench: Bench
    defense: tuple[str, dict[str, Any]]
    clock: Clock
    store: Store | None
    tell: Tell

    def audit(self, wanted: Sequence[Guard] | None) -> Audit:
        """Run everything, in order."""
        skipped: list[str] = []
        cells = {
            each.name: [self.bench.cell(each, attack, self.defense) for attack in plan.attacks()] for each in ATTACKERS
        }
        self.tell("what can run", self.clock.left)
        reasons = self.bench.reasons([cell for several in cells.values() for cell in several])
        floor = report.guesses(self._controls())
        ran: list[Ran] = []
        for attacker in ATTACKERS:
            able = [cell for cell in cells[attacker.name] if cell.key not in reasons]
            skipped += [
                f"{attacker.name}, {cell.attack.label}: {reasons[cell.key]}"
                for cell in cells[attacker.name]
                if cell.key in reasons
            ]
            share = 1 - _REMEDIES if attacker is ATTACKERS[-1] else (1 - _REMEDIES) * 0.6
            ran += self._attacked(able, share * self.clock.budget, ran, floor, skipped)
        malicious = self._malicious(floor, skipped)
        if report.verdict_of([report.finding(each, floor) for each in ran]) == report.UNSURE:
            ran += self._longer(ran)
        findings = [report.finding(each, floor) for each in ran]
        worst, verdict = report.strongest(findings), report.verdict_of(findings)
        tried: list[Remedy] = []
        if verdict == report.LEAKS and worst is not None:
            tried = self._remedies(wanted, ran, findings, floor, skipped)
        images = self.bench.victims * self.bench.setting.batch_size
        return Audit(
            verdict=verdict,
            share=report.interval(0.0 if worst is None else worst.share, images),
            images=images,
            training=self._described(),
            worst=worst,
            findings=tuple(findings),
            malicious=malicious,
            advice=report.advice(findings, 1 / _REMEDIES),
            floor=sum(floor.values()) / len(floor) if floor else math.nan,
            exposed=tuple(self._exposed(ran[findings.index(worst)])) if worst is not None else (),
            remedies=tuple(tried),
            not_run=tuple(_once(skipped)),
            trained=_measured(self.bench) if tried else "",
            seconds=self.clock.spent,
            store="" if self.store is None else str(self.store.path),
        )

    def _controls(self) -> list[Ran]:
        self.tell("guesses that read nothing", self.clock.left)
        return [
            self._keep(self.bench.run(self.bench.cell(ATTACKERS[0], each, self.defense), self.clock.budget / 10))
            for each in plan.controls()
        ]

    def _longer(self, ran: Sequence[Ran]) -> list[Ran]:
        """Run the search that came farthest again, with the time that is not needed for defenses."""
        short = [each for each in ran if each.reached < 1 and not each.result.error]
        if not short:
            return []
        best, seconds = max(short, key=lambda each: each.reached), 0.9 * self.clock.left
        if not 2 * best.iteration * (best.iterations or 0) < seconds:
            return []
        self.tell(f"{best.attacker}, {best.attack}{plan.LONGER}", self.clock.left)
        part = replace(
            best.cell.attack,
            label=f"{best.attack}{plan.LONGER}",
            options={**best.cell.attack.options, "iterations": best.usual},
        )
        return [self._keep(self.bench.run(replace(best.cell, attack=part), seconds, best))]

    def _malicious(self, floor: dict[tuple[int, int], float], skipped: list[str]) -> Finding | None:
        """Let the server put a block into the model that holds images apart: a closed form reads them."""
        cell = self.bench.cell(plan.MALICIOUS, ("imprint-readout", "imprint-readout", {}), self.defense)
        if self.clock.left <= 0:
            skipped.append(f"{plan.MALICIOUS.name}: no time was left")
            return None
        self.tell(plan.MALICIOUS.name, self.clock.left)
        try:
            found = report.finding(self._keep(self.bench.run(cell, self.clock.left / 2)), floor)
        except GradleakError as error:
            skipped.append(f"{plan.MALICIOUS.name}: {plan.refused(error)}")
            return None
        if found.error:
            skipped.append(f"{plan.MALICIOUS.name}: {found.error}")
        return None if found.error else found

    def _attacked(
        self,
        cells: Sequence[AttackCell],
        until: float,
        before: Sequence[Ran],
        floor: dict[tuple[int, int], float],
        skipped: list[str],
    ) -> list[Ran]:
        """Run the attacks of one attacker, the first search the longest, until so many seconds are gone."""
        found: list[Ran] = []
        for index, cell in enumerate(cells):
            left, title = until - self.clock.spent, f"{cell.setting.name}, {cell.attack.label}"
            share, reason = left / (len(cells) - index), ""
            if cell.attack.label == "inverting-gradients":
                share = max(share, min(left, _SEARCH * self.clock.budget))
            if any(_everything(report.finding(each, floor)) for each in found):
                reason = "every image had come back already"
            elif left <= 0:
                reason = "no time was left"
            elif _second_order(cell.built_attack) and self._too_slow([*before, *found], cell, share):
                reason = "an iteration takes too long for this budget"
            if reason:
                skipped.append(f"{title}: {reason}")
                continue
            self.tell(title, self.clock.left)
            found.append(self._keep(self.bench.run(cell, share)))
        return found

    def _too_slow(self, ran: Sequence[Ran], cell: Any, seconds: float) -> bool:
        """Whether a step of a second-order search would not fit, by what a gradient took in a first-order one."""
        from ..engine.gauss_newton import LevenbergMarquardt

        searches = [each for each in ran if each.iterations and each.result.seconds]
        if not searches:
            return True
        last = searches[-1]
        gradient = last.result.seconds / (last.iterations or 1)
        unknowns = self.bench.setting.batch_size * math.prod(self.bench.workshop.images.shape)
        restarts = cell.attack.options.get("restarts", 1)
        # In float64, and with a derivative in the forward direction for every product.
        return bool(3 * gradient * LevenbergMarquardt().gradients(unknowns) * restarts * 5 > seconds)

    def _remedies(
        self,
        wanted: Sequence[Guard] | None,
        ran: Sequence[Ran],
        findings: Sequence[Finding],
        floor: dict[tuple[int, int], float],
        skipped: list[str],
    ) -> list[Remedy]:
        """Try defenses against the strongest attacks, as long as there is time, and train under each."""
        candidates = _candidates(wanted, self.defense[0])
        strongest = _strongest_attacks(ran, findings)
        plain, each = self._accuracy(self.defense), 0.0
        found: list[Remedy] = []
        for index, defense in enumerate(candidates):
            share = self.clock.left / (len(candidates) - index)
            share = max(share, each, self.clock.budget / 20)
            if self.clock.left < share / 2:
                skipped.append(f"defense {defense[0]}: no time was left")
                continue
            begun = self.clock.spent
            self.tell(f"defense {defense[0]}", self.clock.left)
            found.append(self._remedy(defense, strongest, floor, share, plain))
            each = min(self.clock.spent - begun, share)
        return found

    def _remedy(
        self,
        defense: tuple[str, dict[str, Any]],
        attacks: Sequence[tuple[str, str, dict[str, Any]]],
        floor: dict[tuple[int, int], float],
        seconds: float,
        plain: float,
    ) -> Remedy:
        faced: list[Finding] = []
        notes: list[str] = []
        try:
            cells = [self.bench.cell(ATTACKERS[0], attack, defense) for attack in attacks]
            reasons = self.bench.reasons(cells)
        except GradleakError as error:
            return Remedy(defense[0], report.UNSURE, 0.0, math.nan, (), note=plan.refused(error))
        for cell in cells:
            if cell.key in reasons:
                notes.append(f"{cell.attack.label}: {reasons[cell.key]}")
                continue
            ran = self._keep(self.bench.run(cell, 0.7 * seconds / len(attacks)))
            faced.append(report.finding(ran, floor))
            if ran.result.error:
                notes.append(f"{cell.attack.label}: {ran.result.error}")
        worst = report.strongest(faced)
        accuracy = math.nan
        if faced and self.clock.left > 0:
            accuracy = self._accuracy(defense, notes)
        elif faced:
            notes.append("accuracy: no time was left")
        return Remedy(
            defense=defense[0],
            verdict=report.verdict_of(faced),
            share=0.0 if worst is None else worst.share,
            psnr=math.nan if worst is None else worst.psnr,
            attacks=tuple(each.attack for each in faced),
            accuracy=accuracy,
            lost=plain - accuracy,
            note="; ".join(notes),
        )

    def _accuracy(self, defense: tuple[str, dict[str, Any]], notes: list[str] | None = None) -> float:
        """Return the accuracy after further training under a defense; NaN where it cannot be trained under."""
        result = evaluate(plan.training(self.bench, defense, _recipe(self.bench)), self.bench.workshop)
        if not result.error:
            accuracy = Provenance.of(result.provenance).test_accuracy
            return math.nan if accuracy is None else accuracy
        if notes is not None:
            notes.append(f"accuracy: {result.error}")
        return math.nan

    def _exposed(self, worst: Ran) -> list[Exposed]:
        """Return the images that came back best, beside the truth."""
        images, labels = self.bench.workshop.victims_of(worst.cell)
        rows = [row for row in worst.result.rows if row.psnr is not None and row.matched is not None]
        found = []
        for row in sorted(rows, key=lambda row: -(row.psnr or 0.0))[:_SHOWN]:
            assert row.psnr is not None and row.matched is not None
            answer = worst.result.reconstructions[row.victim][row.matched]
            truth, label = images[row.victim][row.image], int(labels[row.victim][row.image])
            found.append(Exposed(truth, answer, row.psnr, label))
        return found

    def _keep(self, ran: Ran) -> Ran:
        if self.store is not None:
            self.store.write_victims(victim_list(ran.cell.stored()), *self.bench.workshop.victims_of(ran.cell))
            self.store.offer(ran.result)
        return ran

    def _described(self) -> str:
        setting, size = self.bench.setting, self.bench.setting.batch_size
        step = "one gradient" if setting.local_lr is None else f"{setting.local_steps} local steps"
        client = setting.trains
        by = setting.client.name or "sgd"
        guard = "no defense" if self.defense[0] == "none" else f"defense {self.defense[0]}"
        return (
            f"{self.bench.model.label}, {client.loss}, {step} of {size} image{'s' * (size > 1)} ({by}), {guard}, "
            f"{self.bench.victims} clients"
        )


def _everything(found: Finding) -> bool:
    """Whether no attack could do better."""
    return found.share == 1 and found.psnr >= _PERFECT


def _once(skipped: Sequence[str]) -> list[str]:
    """Return what was not run, without the attacker where it holds for every one of them."""
    names = [f"{each.name}, " for each in ATTACKERS]

    def of_all(line: str) -> str:
        rest = next((line.removeprefix(name) for name in names if line.startswith(name)), line)
        return rest if all(f"{name}{rest}" in skipped for name in names) else line

    return list(dict.fromkeys(map(of_all, skipped)))


def _second_order(plugin: Any) -> bool:
    return getattr(plugin, "optimiser", "") == "levenberg-marquardt"


def _strongest_attacks(ran: Sequence[Ran], findings: Sequence[Finding]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the two strongest attacks of the undefended training, and a search that adapts to defenses."""
    order = sorted(range(len(ran)), key=lambda index: (findings[index].share, findings[index].psnr), reverse=True)
    wanted = [ran[index].attack for index in order][:2]
    known = {label: (name, label, options) for name, label, options in plan.attacks()}
    return [known[label] for label in dict.fromkeys([*wanted, "inverting-gradients"])][:3]


def _candidates(wanted: Sequence[Guard] | None, own: str) -> list[tuple[str, dict[str, Any]]]:
    if wanted is not None:
        return [(each, {}) if isinstance(each, str) else each for each in wanted]
    names = [name for name in registry.names("defenses") if name not in members(own) and name != "none"]
    first = [name for name in _PREFERRED if name in names]
    return [(name, {}) for name in (*first, *(name for name in names if name not in first))]


def _recipe(bench: Bench) -> Utility:
    """Return a short further training of the user's clients on the public half."""
    setting, images = bench.setting, len(bench.workshop.images.split.train)
    clients = max(1, min(4, images * 9 // 10 // max(4, setting.batch_size)))
    return Utility(clients=clients, rounds=40, batch_size="setting", lr=[0.1]).at(setting)


def _measured(bench: Bench) -> str:
    recipe, split = _recipe(bench), bench.workshop.images.split
    return (
        f"Accuracy: after {recipe.rounds} further rounds of {recipe.clients} such clients on {len(split.train)} of "
        f"your images, from your weights, on {len(split.test)} others; points lost: against the same training as it is."
    )
