"""Models marked in 2026 verify for ever: ``golden/`` holds their files and the ``make`` files that made them.

``model``: filter gradients alone, without a reference. ``ensemble``: both schemes, with sealed references.
``paths``: products of a residual network's weights, with sealed profiles of its channels; white-box alone.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make import CARRIERS, QUERIES, net
from golden.make_paths import residual
from gradmark import catalog
from gradmark.claim import ClaimFile, Opening, check_claim, pool_digest
from gradmark.claim.timestamp import load_certificates
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.errors import MarkFileError, MismatchError
from gradmark.files import sha256
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, Verdict
from gradmark.streams import orders, rename
from gradmark.suspects import ModuleSuspect, load_weights
from gradmark.verify import verify

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = {
    "model": "golden-v1.safetensors",
    "ensemble": "golden-ensemble-v1.safetensors",
    "joint": "golden-joint-v1.safetensors",
    "features": "golden-features-v1.safetensors",
    "paths": "golden-paths-v1.safetensors",
}
MARKS = {name: MarkFile.load(GOLDEN / f"mark-{name}-v1.json") for name in WEIGHTS}
KEY = OwnerKey.load(GOLDEN / "key-v1.json")
CLAIM, STAMPED = (
    "sha256:ed86e4a0ea644f93a456a0ef89e09af8c3e37a83144a6753096fb3d0dc221284",
    "2026-11-25T20:06:21+00:00",
)
EXPECTED: dict[str, dict[str, Any]] = {
    name: json.loads((GOLDEN / f"expected-{name}-v1.json").read_text()) for name in WEIGHTS
}

# Another processor or BLAS moves a reading by some 1e-6 logits. No two of the recorded sizes are so near to
# each other, nor one to zero, that this could swap their ranks (test_recorded_readings_are_apart), so p stays
# the same to the last digits, and a thousandth leaves room for nothing but rounding.
APART, READINGS, LOG10_P = 5e-5, 2e-5, 1e-3


each = pytest.mark.parametrize(
    ("name", "access"),
    [
        (name, access)
        for name in WEIGHTS
        for access in ("white", "black")
        if (name, access) != ("paths", "black")
    ],
)


@cache
def suspect(name: str) -> ModuleSuspect:
    model = (residual() if name == "paths" else net()).eval()
    load_weights(model, GOLDEN / WEIGHTS[name])
    return ModuleSuspect(model, name="golden")


@pytest.fixture(scope="module")
def pool() -> Batch:
    """As many inputs as the mark takes carriers: all of them are used, in whatever order."""
    pytest.importorskip("sklearn")
    return load_data("digits").test.batch(slice(0, CARRIERS))


def judged(mark: MarkFile, key: OwnerKey, name: str, pool: Batch, access: Access) -> Verdict:
    return verify(mark, key, suspect(name), pool, access=access, queries=QUERIES)


@each
def test_the_golden_models_verify(name: str, pool: Batch, access: Access) -> None:
    v, old = judged(MARKS[name], KEY, name, pool, access), EXPECTED[name][access]
    assert v.reading is not None
    assert v.reading.bits.tolist() == old["bits"]
    torch.testing.assert_close(
        v.reading.values, torch.tensor(old["readings"], dtype=torch.float64), rtol=0, atol=READINGS
    )
    assert list(v.reading.parts) == old.get("parts", [])
    assert v.log10_p == pytest.approx(old["log10_p"], abs=LOG10_P)
    assert (v.n_match, v.ties, v.queries) == (old["n_match"], old["ties"], old["queries"])
    assert v.outcome == "owned"
    assert (v.mark, v.suspect) == (EXPECTED[name]["mark"], EXPECTED[name]["suspect"])


@each
def test_recorded_readings_are_apart(name: str, access: Access) -> None:
    old = EXPECTED[name][access]
    readings = torch.tensor(old["readings"], dtype=torch.float64).abs()
    for part in readings.split(old.get("parts") or [len(readings)]):
        assert float(torch.cat([torch.zeros(1).double(), part]).sort().values.diff().min()) > APART


@each
def test_a_wrong_key_finds_nothing(name: str, pool: Batch, access: Access) -> None:
    wrong, mark = OwnerKey(bytes(32), "Acme Ltd"), MARKS[name]
    with pytest.raises(MismatchError):
        judged(mark, wrong, name, pool, access)
    own = MarkFile.create(wrong, mark.scheme, without_references(mark), mark.spec, mark.test, mark.carriers)
    assert judged(own, wrong, name, pool, access).outcome == "no-evidence"


def without_references(mark: MarkFile) -> dict[str, Any]:
    """The mark's parameters for another key, which can't open what is sealed."""
    parts = mark.scheme_parameters.get("parts")
    if parts is None:
        return {n: v for n, v in mark.scheme_parameters.items() if n != "reference"}
    rows = [
        {**part, "parameters": {n: v for n, v in part["parameters"].items() if n != "reference"}}
        for part in parts
    ]
    return {**mark.scheme_parameters, "parts": rows}


def test_the_golden_network_renamed_reads_the_same(pool: Batch) -> None:
    """Its stream's channels in another order: the profiles in the mark file find them."""
    model, x = copy.deepcopy(suspect("paths").module), pool[0]
    rename(model, orders(model, x, torch.Generator().manual_seed(0)))
    assert not torch.equal(model.get_parameter("0.weight"), suspect("paths").module.get_parameter("0.weight"))
    v = verify(MARKS["paths"], KEY, ModuleSuspect(model), pool, access="white")
    assert v.log10_p == pytest.approx(EXPECTED["paths"]["white"]["log10_p"], abs=LOG10_P)


def test_the_golden_references_are_opened_by_their_key_alone() -> None:
    """Their numbers, which the bits follow from, to the last digit."""
    mark, wrong = MARKS["ensemble"], OwnerKey(bytes(32), "Acme Ltd")
    scheme = catalog.scheme(mark.scheme, mark.scheme_parameters)
    secret = scheme.mark(KEY, mark.spec)
    assert [values.tolist() for values in secret.reference] == EXPECTED["ensemble"]["references"]
    with pytest.raises(MarkFileError, match="can't be opened"):
        scheme.mark(wrong, mark.spec)


def test_the_golden_network_reads_with_other_data_than_it_was_calibrated_with() -> None:
    """Its channels can't be told at other inputs, and have kept their places."""
    x, labels = load_data("digits").test.all()
    for rows in (slice(0, 300), slice(300, None)):
        v = verify(MARKS["paths"], KEY, suspect("paths"), (x[rows], labels[rows]), access="white")
        assert v.log10_p < -15


# --- claims -----------------------------------------------------------------------------------------------


def test_the_golden_claim_is_valid_for_ever() -> None:
    """Signature, commitment, model, inputs, and a time stamp whose authority has long gone."""
    file = ClaimFile.load(GOLDEN / "claim-v1.json")
    opening = Opening.load(GOLDEN / "opening-v1.json")
    trusted = load_certificates(GOLDEN / "claim-v1-ca.pem")
    weights = sha256((GOLDEN / "golden-ensemble-v1.safetensors").read_bytes())
    found = check_claim(file, key=opening.key, model=weights, trusted=trusted)
    assert [(check.name, check.ok) for check in found.checks] == [
        (name, True) for name in ("signature", "threshold", "key", "model", "time")
    ]
    assert opening.claim == file.digest == CLAIM
    assert found.attested is not None
    assert found.attested.isoformat() == STAMPED
    assert found.stamps[0].authority == "CN=Golden authority"
    assert file.to_bytes() == (GOLDEN / "claim-v1.json").read_bytes()
    assert opening.to_bytes(None) == (GOLDEN / "opening-v1.json").read_bytes()
    assert opening.key == KEY


def test_the_golden_claims_inputs_are_the_digits() -> None:
    pytest.importorskip("sklearn")
    fixed = ClaimFile.load(GOLDEN / "claim-v1.json").claim.rule.pool
    assert fixed is not None
    assert fixed.digest == pool_digest(load_data("digits").test.all())
