"""Several schemes under one key: each with bits of its own, read with its share, tested apart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import KEY, SPECS, Counting, inputs, network, white
from gradmark import catalog
from gradmark.codec import MarkFile, canonical_json
from gradmark.commands.job import EmbedJob
from gradmark.embed import Marker
from gradmark.embed.heads import answered
from gradmark.ensemble import Ensemble
from gradmark.errors import MarkFileError, UnknownNameError, UsageError
from gradmark.schemes.class_contrast import ClassContrast
from gradmark.schemes.feature_contrast import FeatureContrast
from gradmark.schemes.filter_gradient import FilterGradient
from gradmark.schemes.probe_gradient import ProbeGradient
from gradmark.schemes.trigger import Trigger
from gradmark.schemes.weights import Weights
from gradmark.stats import fisher, run_test
from gradmark.verify import verify

SPEC, POOL = SPECS["grey"], inputs("grey", 80, seed=1)
FILTER, CLASS = FilterGradient(bits=13, step=0.2), ClassContrast(bits=21)
BOTH = Ensemble((FILTER, CLASS))


def fixed(**changes: Any) -> Any:
    return replace(SPEC, **changes)


# --- the mark ---------------------------------------------------------------------------------------------


def test_in_an_older_mark_a_parts_bits_are_its_own() -> None:
    alone = [part.mark(KEY, SPEC).bits for part in BOTH.parts]
    assert not torch.equal(alone[0], alone[1][:13])
    for order in itertools.permutations((0, 1)):
        mark = Ensemble(tuple(BOTH.parts[i] for i in order), joint=False).mark(KEY, SPEC)
        assert mark.sizes == tuple(len(alone[i]) for i in order)
        assert torch.equal(mark.bits, torch.cat([alone[i] for i in order]))
    third = Ensemble((FILTER, ProbeGradient(), CLASS), joint=False).mark(KEY, SPEC)
    assert torch.equal(third.parts[2].bits, alone[1])
    assert torch.equal(mark.order(9), mark.parts[0].order(9))


def test_every_bit_hangs_on_the_whole_mark() -> None:
    """A part's other secrets are its own, so that it can be read; its bits change with any part's."""
    marks: list[Any] = [
        Ensemble(parts).mark(KEY, SPEC)
        for parts in (
            (FILTER, CLASS, Trigger()),
            (FILTER, CLASS, Trigger(bits=65)),
            (FILTER, CLASS.calibrated(KEY, SPEC, white(network("grey")), POOL), Trigger()),
            (CLASS, FILTER, Trigger()),
        )
    ]
    same = Ensemble((FILTER, CLASS, Trigger())).mark(KEY, SPEC)
    assert torch.equal(marks[0].bits, same.bits)
    first = [{type(p): p.bits for p in m.parts} for m in marks]
    for other in first[1:]:
        for kind, bits in first[0].items():
            agreed = float((other[kind][: len(bits)] == bits).float().mean())
            assert agreed < 0.95, "only its own part's parameters count"
    assert torch.equal(marks[0].parts[1].contrasts, CLASS.mark(KEY, SPEC).contrasts)
    assert torch.equal(marks[0].parts[2].inputs, Trigger().mark(KEY, SPEC).inputs)
    labels, pairs = marks[0].parts[2].labels, marks[0].parts[2].pairs
    assert torch.equal(labels == pairs[:, 0], marks[0].parts[2].bits > 0), "triggers teach the joint bits"


def test_joint_bits_are_drawn_as_the_format_says() -> None:
    scheme = Ensemble((FILTER, CLASS))
    whole = {"scheme": "ensemble", "parameters": scheme.parameters(), "spec": SPEC.to_json()}
    signs = torch.from_numpy(KEY.uniform_bits("joint bits", 34, context=canonical_json(whole)))
    alone = torch.cat([part.mark(KEY, SPEC).bits for part in scheme.parts])
    assert torch.equal(scheme.mark(KEY, SPEC).bits, alone * signs)


def test_parameters_survive_the_mark_file() -> None:
    fitted = BOTH.calibrated(KEY, SPEC, white(network("grey")), POOL)
    assert [bool(part.reference) for part in fitted.parts] == [True, True]
    for scheme in (BOTH, fitted, replace(BOTH, joint=False), Ensemble((CLASS, FILTER)), Ensemble((CLASS,))):
        file = MarkFile.create(KEY, scheme.name, scheme.parameters(), SPEC, "signed-rank", 50)
        again = MarkFile.from_bytes(file.to_bytes())
        assert catalog.scheme(again.scheme, again.scheme_parameters) == scheme
        assert catalog.scheme("weights,trigger", again.scheme_parameters) == scheme, "parts count, not names"
    assert fitted.parameters()["parts"][0]["scheme"] == "filter-gradient"
    assert fitted.mark(KEY, SPEC).reference[0].shape == (13,)
    assert BOTH.mark(KEY, SPEC).reference == (None, None)


def test_names_on_the_command_line() -> None:
    flagship: Any = catalog.scheme(catalog.FLAGSHIP, {"bits": 24})
    others = tuple(catalog.SCHEMES[name]() for name in catalog.FLAGSHIP_PARTS[1:])
    assert flagship == Ensemble((FilterGradient(bits=24), *others))
    assert catalog.scheme("class-contrast, weights", {"bits": 9}) == Ensemble(
        (ClassContrast(bits=9), Weights())
    )
    with pytest.raises(UnknownNameError, match="Did you mean 'class-contrast'"):
        catalog.scheme("filter-gradient,class-contrasts")
    with pytest.raises(UnknownNameError):
        catalog.scheme("filter-gradient,")
    joined: Any = catalog.scheme("ensemble,weights", {"weights.preserve": 0.5, "bits": 24})
    assert joined.parts == (*flagship.parts, Weights(preserve=0.5))
    assert Weights(layers="*") == Weights(layers=("*",))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="different names"):
        catalog.scheme("filter-gradient,ensemble")
    with pytest.raises(UsageError, match="different names"):
        catalog.scheme("weights,weights")
    with pytest.raises(MarkFileError, match="parameters of scheme filter-gradient"):
        catalog.scheme(catalog.FLAGSHIP, {"bitz": 3})


ROW = {"scheme": "class-contrast", "parameters": {}}


@pytest.mark.parametrize(
    "given",
    [
        {"parts": [{"scheme": "klass-contrast", "parameters": {}}]},
        {"parts": [{"scheme": "ensemble", "parameters": {"parts": [ROW]}}]},
        {"parts": [{"scheme": "class-contrast,weights", "parameters": {}}]},
        {"parts": [{"scheme": ["class-contrast"], "parameters": {}}]},
        {"parts": [{"scheme": "class-contrast"}]},
        {"parts": [{**ROW, "bits": 3}]},
        {"parts": [{"scheme": "class-contrast", "parameters": [3]}]},
        {"parts": ["class-contrast"]},
        {"parts": {"scheme": "class-contrast", "parameters": {}}},
        {"parts": 3},
        {"parts": [ROW], "bits": 3},
        {"parts": [ROW], "joint": 1},
        {"parts": [ROW], "joint": "yes"},
    ],
)
def test_parts_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(MarkFileError, match="parts of the ensemble"):
        catalog.scheme("ensemble", given)


def test_hostile_parts_are_refused() -> None:
    for parts in ([], [ROW, ROW]):
        with pytest.raises(UsageError, match="different names"):
            catalog.scheme("ensemble", {"parts": parts})
    with pytest.raises(UsageError, match="different names"):
        Ensemble((FILTER, BOTH))
    with pytest.raises(MarkFileError, match="parameters of scheme class-contrast"):
        catalog.scheme("ensemble", {"parts": [{**ROW, "parameters": {"bitz": 3}}]})
    given = {"parts": [ROW]}
    catalog.scheme("ensemble", given)
    assert given == {"parts": [ROW]}, "the caller's own stays"


@pytest.mark.parametrize(("classes", "kept"), [(2, 1), (3, 1), (4, 2), (10, 2)])
def test_parts_without_room_are_left_out(classes: int, kept: int) -> None:
    spec = fixed(n_classes=classes)
    fitting = BOTH.fitting(spec)
    assert [part.name for part in fitting.parts] == ["filter-gradient", "class-contrast"][:kept]
    assert len(fitting.mark(KEY, spec).sizes) == kept
    job = EmbedJob("m:f", "digits", KEY, Path("out"))
    scheme: Any = job.scheme_value(spec)
    names = [name for name in catalog.FLAGSHIP_PARTS if kept == 2 or name != "class-contrast"]
    assert [part.name for part in scheme.parts] == names


def test_the_reference_names_the_flagships_parts(root: Path) -> None:
    assert f"`{','.join(catalog.FLAGSHIP_PARTS)}`" in (root / "docs" / "reference.md").read_text()


def test_an_ensemble_without_any_room_is_refused() -> None:
    with pytest.raises(UsageError):
        Ensemble((CLASS,)).fitting(fixed(n_classes=3))
    with pytest.raises(UsageError, match="filter-gradient"):
        BOTH.mark(KEY, fixed(n_classes=3))


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [7, 100, 301, 10**6])
def test_queries_are_shared_and_counted(budget: int) -> None:
    """Each part reads as it would alone with its share; the last asks first and leaves what it can't use."""
    suspect, mark = Counting(network("grey")), BOTH.mark(KEY, SPEC)
    whole = BOTH.read(mark, suspect, POOL, access="black", carriers=40, queries=budget)
    assert whole.queries == suspect.count <= budget
    assert whole.parts == (13, 21)
    last = BOTH.parts[1].read(mark.parts[1], suspect, POOL, access="black", carriers=40, queries=budget // 2)
    first = BOTH.parts[0].read(
        mark.parts[0], suspect, POOL, access="black", carriers=40, queries=budget - last.queries
    )
    alone = [first, last]
    assert whole.queries == first.queries + last.queries
    assert torch.equal(whole.values, torch.cat([r.values for r in alone]))
    assert torch.equal(whole.bits, mark.bits.double())


@pytest.mark.parametrize("budget", [7, 100, 301, 10**6])
def test_the_history_grows(budget: int) -> None:
    mark = BOTH.mark(KEY, SPEC)
    reading = BOTH.read(mark, Counting(network("grey")), POOL, access="black", carriers=40, queries=budget)
    asked = [n for n, _ in reading.history]
    assert asked == sorted(set(asked))
    assert asked[-1] == reading.queries
    assert torch.equal(reading.history[-1][1], reading.values)
    assert all(values.shape == (34,) for _, values in reading.history)


def test_white_box_all_parts_are_read() -> None:
    mark, model = BOTH.mark(KEY, SPEC), white(network("grey"))
    whole = BOTH.read(mark, model, POOL, access="white", carriers=10)
    alone = [
        scheme.read(part, model, POOL, access="white", carriers=10)
        for scheme, part in zip(BOTH.parts, mark.parts, strict=True)
    ]
    assert torch.equal(whole.values, torch.cat([r.values for r in alone]))
    assert (whole.queries, whole.history, whole.access) == (0, (), "white")
    assert whole.carriers == max(r.carriers for r in alone) == 80, "natural inputs are cheap"


def test_what_needs_weights_is_silent_at_an_api() -> None:
    """It reads zeros, takes none of the queries, and the others' evidence stands."""
    scheme = Ensemble((Weights(), FILTER))
    assert (scheme.needs, Ensemble((Weights(),)).needs) == ("black", "white")
    mark, suspect = scheme.mark(KEY, SPEC), Counting(network("grey"))
    reading = scheme.read(mark, suspect, POOL, access="black", carriers=40, queries=150)
    silent, heard = reading.values.split(reading.parts)
    alone = FILTER.read(mark.parts[1], suspect, POOL, access="black", carriers=40, queries=150)
    assert bool((silent == 0).all())
    assert torch.equal(heard, alone.values)
    assert reading.queries == alone.queries == 150
    assert [n for n, _ in reading.history] == [n for n, _ in alone.history]
    file = MarkFile.create(KEY, scheme.name, scheme.parameters(), SPEC, "signed-rank", 40)
    verdict = verify(file, KEY, Counting(network("grey")), POOL, access="black", queries=150)  # type: ignore[arg-type]
    own = run_test("signed-rank", (alone.values * alone.bits).numpy())
    assert verdict.log10_p == pytest.approx(own.log10_p), "a silent part costs nothing"
    assert (verdict.ties, verdict.n_match) == (len(silent), own.n_match)


def test_bits_in_the_weights_take_turns_beside_answers() -> None:
    """However many they are, they weigh as much as another part, and each of them is probed at times."""
    scheme = Ensemble((CLASS, Weights(bits=300)))
    mark, generator = scheme.mark(KEY, SPEC), torch.Generator().manual_seed(0)
    model, some = network("grey"), (POOL[0][:4], POOL[1][:4])
    alone = CLASS.probe(mark.parts[0], model, some, generator, "exact")[0].numel()
    assert alone < 300
    seen: set[int] = set()
    for _ in range(40):
        values, numbers = scheme.probe(mark, model, some, generator, "exact")
        mine = numbers[(numbers >= mark.sizes[0]) & (numbers < sum(mark.sizes))].tolist()
        assert len(values) == len(numbers) == 2 * alone
        assert len(mine) == len(set(mine)) == alone
        seen |= set(mine)
    assert len(seen) > 290
    only, _ = scheme.probe(mark, model, some, generator, "exact", only=[1])
    assert len(only) == 300, "by themselves they are all read"
    assert answered(scheme, mark.sizes).sum() == mark.sizes[0]
    assert not answered(Weights(), (64,)).any()
    assert bool(answered(FILTER, (13,)).all())


def test_no_query_at_all_is_no_evidence() -> None:
    three = Ensemble((FILTER, CLASS, ProbeGradient()))
    reading = three.read(
        three.mark(KEY, SPEC), Counting(network("grey")), POOL, access="black", carriers=40, queries=1
    )
    assert (reading.queries, reading.carriers, reading.history) == (0, 0, ())
    assert bool((reading.values == 0).all())


def test_the_verdict_is_fishers_of_the_parts() -> None:
    file = MarkFile.create(KEY, BOTH.name, BOTH.parameters(), SPEC, "signed-rank", 40)
    verdict = verify(file, KEY, white(network("grey", seed=4)), POOL)
    assert verdict.reading is not None
    signed = (verdict.reading.values * verdict.reading.bits).split([13, 21])
    ps = [run_test("signed-rank", part.numpy()).log10_p for part in signed]
    assert verdict.log10_p == pytest.approx(fisher(ps))
    assert (verdict.n_bits, verdict.scheme, verdict.outcome) == (34, "ensemble", "no-evidence")


# --- the penalty ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "central-difference"])
@pytest.mark.parametrize("parts", [(FILTER, CLASS), (CLASS, FILTER)])
def test_probes_are_numbered_through(method: str, parts: tuple[Any, ...]) -> None:
    """In units of each part's margin; what carries no bit is zero and has the number after
    the last one. A part with fewer readings is repeated: its share of the penalty's mean is no smaller."""
    scheme = Ensemble(parts)
    mark, model, batch = scheme.mark(KEY, SPEC), network("grey"), inputs("grey", 200, seed=2)
    signed, index = scheme.probe(mark, model, batch, torch.Generator().manual_seed(1), method)
    assert signed.shape == index.shape
    assert sorted(set(index.flatten().tolist())) == list(range(34 + 1))
    assert bool((signed[index == 34] == 0).all())
    generator, first, counts = torch.Generator().manual_seed(1), 0, []
    for part, own in zip(parts, mark.parts, strict=True):
        values, i = part.probe(own, model, batch, generator, method)
        keep = i < len(own.bits)
        mine = (index >= first) & (index < first + len(own.bits))
        times = int(mine.sum()) // int(keep.sum())
        assert torch.equal(signed[mine], (values[keep] / part.margin).repeat(times))
        assert torch.equal(index[mine], (i[keep] + first).repeat(times))
        counts.append(values.numel() * times)
        first += len(own.bits)
    assert max(counts) < 2 * min(counts)
    assert mark.limits.tolist() == [
        scheme.shares[p.name] for p, n in zip(parts, mark.sizes, strict=True) for _ in range(n)
    ]
    signed.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.dim() > 1)


def test_a_part_that_pushes_harder_has_more_of_the_penalty() -> None:
    """As many times the others' share as it says, and no other numbers."""
    loud, quiet = (FeatureContrast(features=2, contrasts=4, view=view) for view in ("overall", "cells"))
    assert (loud.push, quiet.push) == (10, 1)
    for part in (loud, quiet):
        scheme = Ensemble((CLASS, part))
        mark = scheme.mark(KEY, SPEC)
        signed, index = scheme.probe(mark, network("grey"), POOL, torch.Generator(), "exact")
        own = (index[:, 0] >= mark.sizes[0]) & (index[:, 0] < sum(mark.sizes))
        values, numbers = part.probe(mark.parts[1], network("grey"), POOL, torch.Generator(), "exact")
        times = int(own.sum()) // values.numel()
        assert times == part.push * max(1, int((~own).sum()) // values.numel())
        torch.testing.assert_close(signed[own, 0], (values.flatten() / part.margin).repeat(times))
        assert torch.equal(index[own, 0], (numbers.flatten() + mark.sizes[0]).repeat(times))


# --- parts that are placed --------------------------------------------------------------------------------


def test_probing_some_parts_is_probing_them_alone() -> None:
    """Same numbers of bits, same values, whatever the others are."""
    model, single, both = network("grey"), Ensemble((CLASS,), joint=False), replace(BOTH, joint=False)
    alone = single.probe(single.mark(KEY, SPEC), model, POOL, torch.Generator(), "central-difference")
    mark = both.mark(KEY, SPEC)
    some = both.probe(mark, model, POOL, torch.Generator(), "central-difference", only=[1])
    assert torch.equal(some[0], alone[0])
    assert torch.equal(some[1], alone[1] + 13)


def test_ease_leaves_out_what_is_placed() -> None:
    """All at first; then the part that falls short, and the placed one on every eighth penalty."""
    asked: list[int] = []
    model = network("grey")
    model.register_forward_hook(lambda _, given, __: asked.append(len(given[0])))
    for ease in (False, True):
        marker = Marker(
            BOTH, KEY, SPEC, ease=ease, every=1, carriers=10, weight=1.0, method="central-difference"
        )
        full = torch.cat([torch.full((13,), 5.0), torch.zeros(21)]).double()
        rows, penalties = [], []
        for _ in range(17):
            marker.load_state_dict({**marker.state_dict(), "readings": full})
            asked.clear()
            penalties.append(marker.penalty(model, POOL))
            rows.append(sum(asked))
        filtered = [n >= 30 for n in rows[1:]]  # the first call has the preflight
        assert filtered == ([True] * 16 if not ease else [i % 8 == 0 for i in range(1, 17)])
        assert all(p.item() > 0 for p in penalties)


def test_ease_stops_where_nothing_is_left_to_do() -> None:
    marker = Marker(BOTH, KEY, SPEC, ease=True, every=1, carriers=10, weight=1.0)
    marker.penalty(network("grey"), POOL)
    marker.load_state_dict({**marker.state_dict(), "readings": torch.full((34,), 5.0).double()})
    found = [marker.penalty(network("grey"), POOL).requires_grad for _ in range(1, 9)]
    assert found == [(i % 8 == 0) or ((i + 1) % 8 == 0) for i in range(1, 9)]
