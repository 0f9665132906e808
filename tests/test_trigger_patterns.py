"""Two-tone triggers: at the bounds all over, the key's own, and marks made before them keep their bytes."""

import pytest
import torch

from gradmark import ModelSpec, OwnerKey, catalog
from gradmark.errors import UsageError
from gradmark.inputs import secret_inputs
from gradmark.schemes.trigger import Trigger

KEY = OwnerKey.from_seed(5, "trigger patterns")
IMAGE = ModelSpec("image", (3, 8, 8), n_classes=10, low=0.0, high=1.0, levels=255)
SPECS = (
    IMAGE,
    ModelSpec("signal", (400,), n_classes=5, low=-1.0, high=1.0),
    ModelSpec("vector", (6,), n_classes=3, scale=2.0),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.domain)
def test_two_tone_inputs_are_the_signs_of_the_smooth_ones(spec):
    made = [secret_inputs(KEY, spec, 9, purpose="t", context=b"", pattern=p) for p in ("smooth", "two-tone")]
    smooth, two = made
    assert two.shape == smooth.shape and len(two.unique()) == 2
    middle = 0.0 if spec.low is None else (spec.low + spec.high) / 2
    clear = (smooth - middle).abs() > 0.01 * spec.scale
    assert torch.equal((two > middle)[clear], (smooth > middle)[clear])


def test_an_image_is_at_its_bounds_all_over():
    x = secret_inputs(KEY, IMAGE, 20, purpose="t", context=b"", pattern="two-tone")
    assert set(x.unique().tolist()) == {0.0, 1.0}


def test_an_unknown_pattern_is_refused():
    with pytest.raises(UsageError, match="smooth or two-tone"):
        Trigger(pattern="plaid").mark(KEY, IMAGE)


def test_smooth_triggers_are_written_down_as_before():
    assert Trigger().parameters() == {"bits": 64}
    again = catalog.scheme("trigger", Trigger(pattern="two-tone").parameters())
    assert again == Trigger(pattern="two-tone")
    assert catalog.scheme("trigger", {"bits": 64}) == Trigger()


def test_the_pattern_sets_the_mark_apart():
    smooth, two = (Trigger(pattern=p).mark(KEY, IMAGE) for p in ("smooth", "two-tone"))
    assert not torch.equal(smooth.pairs, two.pairs)


def test_a_two_tone_trigger_stays_what_it_is_for_ever():
    x = secret_inputs(KEY, IMAGE, 1, purpose="t", context=b"", pattern="two-tone")
    said = "".join(str(int(v)) for v in x[0, 0].flatten())
    assert said == "0000111110011111111111100111111000111110001100011100000011000000"
