"""A model marked in 2026 verifies for ever: ``golden/`` holds its files, ``golden/make.py`` made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.make import CARRIERS, QUERIES, net
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.errors import MismatchError
from gradmark.keys import OwnerKey
from gradmark.protocols import Access, Batch, Verdict
from gradmark.suspects import ModuleSuspect, load_weights
from gradmark.verify import verify

GOLDEN = Path(__file__).parent / "golden"
MARK = MarkFile.load(GOLDEN / "mark-model-v1.json")
KEY = OwnerKey.load(GOLDEN / "key-v1.json")
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected-model-v1.json").read_text())

# Another processor or BLAS moves a reading by some 1e-6 logits. No two of the recorded sizes are so near to
# each other, nor one to zero, that this could swap their ranks (test_recorded_readings_are_apart), so p stays
# the same to the last digits, and a thousandth leaves room for nothing but rounding.
APART, READINGS, LOG10_P = 5e-5, 2e-5, 1e-3


@pytest.fixture(scope="module")
def suspect() -> ModuleSuspect:
    model = net().eval()
    load_weights(model, GOLDEN / "golden-v1.safetensors")
    return ModuleSuspect(model, name="golden")


@pytest.fixture(scope="module")
def pool() -> Batch:
    """As many inputs as the mark takes carriers: all of them are used, in whatever order."""
    pytest.importorskip("sklearn")
    return load_data("digits").test.batch(slice(0, CARRIERS))


def judged(mark: MarkFile, key: OwnerKey, suspect: ModuleSuspect, pool: Batch, access: Access) -> Verdict:
    return verify(mark, key, suspect, pool, access=access, queries=QUERIES)


@pytest.mark.parametrize("access", ["white", "black"])
def test_the_golden_model_verifies(suspect: ModuleSuspect, pool: Batch, access: Access) -> None:
    v, old = judged(MARK, KEY, suspect, pool, access), EXPECTED[access]
    assert v.reading is not None
    assert v.reading.bits.tolist() == old["bits"]
    torch.testing.assert_close(
        v.reading.values, torch.tensor(old["readings"], dtype=torch.float64), rtol=0, atol=READINGS
    )
    assert v.log10_p == pytest.approx(old["log10_p"], abs=LOG10_P)
    assert (v.n_match, v.ties, v.queries) == (old["n_match"], old["ties"], old["queries"])
    assert v.outcome == "owned"
    assert (v.mark, v.suspect) == (EXPECTED["mark"], EXPECTED["suspect"])


@pytest.mark.parametrize("access", ["white", "black"])
def test_recorded_readings_are_apart(access: Access) -> None:
    sizes = torch.tensor([0.0, *EXPECTED[access]["readings"]], dtype=torch.float64).abs().sort().values
    assert float(sizes.diff().min()) > APART


@pytest.mark.parametrize("access", ["white", "black"])
def test_a_wrong_key_finds_nothing(suspect: ModuleSuspect, pool: Batch, access: Access) -> None:
    wrong = OwnerKey(bytes(32), "Acme Ltd")
    with pytest.raises(MismatchError):
        judged(MARK, wrong, suspect, pool, access)
    own = MarkFile.create(wrong, MARK.scheme, MARK.scheme_parameters, MARK.spec, MARK.test, MARK.carriers)
    assert judged(own, wrong, suspect, pool, access).outcome == "no-evidence"
