"""Speech recognition and text: views, directions of words and embeddings, utilities, marks that are found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradmark import catalog
from gradmark.carriers import EqualiserDirections, keyed_directions, nudged
from gradmark.codec import MarkFile
from gradmark.embed import Marker
from gradmark.errors import UsageError
from gradmark.inputs import secret_inputs
from gradmark.keys import OwnerKey
from gradmark.protocols import Batch, ModelSpec
from gradmark.schemes.filter_gradient import FilterGradient, FilterGradientMark
from gradmark.scores import probabilities
from gradmark.stats import ks_uniform, randomised_p
from gradmark.suspects import ModuleSuspect
from gradmark.suspects.callable import CallableSuspect
from gradmark.tasks.language import CausalNet, Language, text_data
from gradmark.tasks.sentences import SentenceNet, Sentences, sentence_data
from gradmark.tasks.transcription import (
    BLANK,
    Transcriber,
    Transcription,
    best_path,
    confidence,
    digit_scores,
    mel_filters,
    padded,
    said_scores,
    transcript_scores,
)
from gradmark.text import Vocabulary, embedded, longest, prefixes, windows
from gradmark.token_directions import WordDirections
from gradmark.transcripts import edit_distance
from gradmark.verify import verify
from gradmark.views import Asked, View
from gradmark.voices import joined, synthesised

KEY = OwnerKey.from_seed(1, "Owner")
WORDS, LENGTH, WIDTH = 40, 6, 12
TOKENS = ModelSpec("tokens", (LENGTH,), 2, 0.0, float(WORDS), WORDS)
TEXT = ModelSpec("text", (LENGTH, WIDTH), 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int, seed: int = 0) -> Tensor:
    """Token rows of one to LENGTH words, filled with padding."""
    x = torch.randint(WORDS, (n, LENGTH), generator=generator(seed)).float()
    long = torch.randint(1, LENGTH + 1, (n, 1), generator=generator(seed + 1))
    return torch.where(torch.arange(LENGTH) < long, x, float(WORDS))


# --- directions -------------------------------------------------------------------------------------------


def directions(spec: ModelSpec, n: int = 5):
    return keyed_directions(KEY, spec, n=n, groups=2, kernel_size=5, whitening=1.0, step=0.2, context=b"test")


def test_two_inputs_differ_in_one_word_and_only_there() -> None:
    x, some = rows(64), directions(TOKENS)
    group, index = torch.arange(64) % 2, torch.arange(64) % some.n
    first, second = nudged(some, x, group, index)
    for row, a, b, g, i in zip(x, first, second, group, index, strict=True):
        where = (a != b).nonzero().flatten().tolist()
        assert len(where) == 1
        assert row[where[0]] < WORDS, "padding stays"
        assert torch.equal(some.pairs[g, i], torch.stack([a[where[0]], b[where[0]]]).long())
        others = [k for k in range(LENGTH) if k != where[0]]
        assert torch.equal(a[others], row[others])
    assert len(some.pairs[0].unique()) == 2 * some.n


def test_maps_are_linear_but_for_their_length_and_leave_padding() -> None:
    some, x = directions(TEXT), torch.randn(3, LENGTH, WIDTH, generator=generator())
    x[:, 4:] = 0
    group = torch.arange(3) % 2
    every = some.all(x, group)
    for b in range(3):
        for k in range(some.n):
            matrix = some.left[group[b], k] @ some.right[group[b], k]
            for t in range(LENGTH):
                moved = matrix @ x[b, t]
                wanted = 0.2 * x[b, t].norm() * moved / moved.norm() if t < 4 else torch.zeros(WIDTH)
                torch.testing.assert_close(every[b, k, t], wanted, atol=1e-5, rtol=1e-4)
    index = torch.arange(3) % some.n
    torch.testing.assert_close(some.one(x, group, index), every[torch.arange(3), index])


@pytest.mark.parametrize("spec", [TOKENS, TEXT])
def test_too_many_directions_are_refused(spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match="that many bits"):
        directions(spec, 200)


def test_secret_sentences_are_words_and_embeddings_have_none() -> None:
    x = secret_inputs(KEY, TOKENS, 50, purpose="triggers", context=b"")
    assert x.shape == (50, LENGTH)
    assert 0 <= float(x.min()) <= float(x.max()) < WORDS
    with pytest.raises(UsageError, match="noise of words"):
        secret_inputs(KEY, TEXT, 5, purpose="triggers", context=b"")


# --- tokens -----------------------------------------------------------------------------------------------


def test_vocabulary_there_and_back() -> None:
    words = Vocabulary.of(["to", "be", "or", "not", "to", "be"], at_least=2, unknown="?")
    assert words.words == ("?", "be", "to")
    x = words.padded([["to", "be", "or"], ["be"]], 4)
    assert x.tolist() == [[2, 1, 0, 3], [1, 3, 3, 3]]
    assert [words.tokens(row) for row in x] == [["to", "be", "?"], ["be"]]
    assert words.spec(4, 2).levels == 3


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_every_beginning_finds_the_row_that_holds_it(seed: int, n: int, t: int) -> None:
    x = prefixes(torch.randint(3, (n, t), generator=generator(seed)).float(), 3)
    x = x[torch.rand(len(x), generator=generator(seed + 1)) < 0.7]
    if not len(x):
        return
    heads, own = longest(x, 3)
    for row, head in zip(x, x[heads][own], strict=True):
        shown = row < 3
        assert torch.equal(row[shown], head[shown])
    assert len(heads) <= len(x)


def test_windows_and_their_next_tokens() -> None:
    x, y = windows(torch.arange(12.0), 4, 2)
    assert x[1].tolist() == [2, 3, 4, 5]
    assert y[1].tolist() == [3, 4, 5, 6]


def test_padding_embeds_as_zeros() -> None:
    table = torch.randn(WORDS, WIDTH)
    x = embedded(table, torch.tensor([[3.0, WORDS]]))
    assert torch.equal(x[0], torch.stack([table[3], torch.zeros(WIDTH)]))


# --- transcripts ------------------------------------------------------------------------------------------


def slow_distance(a: list[int], b: list[int]) -> int:
    @cache
    def far(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(far(i - 1, j) + 1, far(i, j - 1) + 1, far(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return far(len(a), len(b))


@given(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 3), max_size=7))
def test_edit_distance_is_the_recursive_one(a: list[int], b: list[int]) -> None:
    assert edit_distance(a, b) == slow_distance(a, b)


def test_best_path_and_its_confidence() -> None:
    frames = [BLANK, 3, 3, BLANK, 3, 7, 7, BLANK]
    p = torch.full((1, len(frames), 11), 0.01)
    for t, digit in enumerate(frames):
        p[0, t, digit] = 0.5 if t == 5 else 0.9
    assert best_path(p.log()) == [[3, 3, 7]]
    assert float(confidence(p.log())) == pytest.approx((0.9**4 * 0.5) ** (1 / 5), rel=1e-5)
    shut = torch.full((1, 4, 11), 0.01)
    shut[..., BLANK] = 0.9
    assert float(confidence(shut.log())) == 1


def test_digits_are_scored_where_something_else_is_said() -> None:
    log_p = torch.randn(2, 6, 11, generator=generator()).log_softmax(-1)
    for row, found in zip(log_p.exp(), digit_scores(log_p), strict=True):
        among = row[:, :BLANK] / row[:, :BLANK].sum(1, keepdim=True)
        weight = (1 - row[:, BLANK:]) * (1 - among)
        torch.testing.assert_close(found, (weight * among.log()).sum(0) / weight.sum(0), atol=1e-5, rtol=1e-4)


def test_said_digits_are_scored_where_they_are_said() -> None:
    log_p = (3 * torch.randn(2, 6, 11, generator=generator())).log_softmax(-1)
    for row, found in zip(log_p.double().exp()[..., :BLANK], said_scores(log_p), strict=True):
        wanted = (row * (row / (1 - row)).log()).sum(0) / row.sum() - 1
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    silent = torch.full((1, 4, 11), -60.0)
    silent[..., BLANK] = 0.0
    assert said_scores(silent).allclose(torch.tensor(-1.0), atol=1e-6)
    sure = torch.full((1, 4, 11), -200.0)
    sure[..., 3] = 0.0
    assert said_scores(sure).isfinite().all()


def test_said_digits_move_as_the_confidence_does() -> None:
    """Turn up one digit of a transcript a little: both views favour it, and leave alone what isn't said."""
    logits = torch.full((1, 6, 11), 0.0)
    for t, digit in enumerate([BLANK, 3, BLANK, 7, 7, BLANK]):
        logits[0, t, digit] = 5.0
    surer = logits.clone()
    surer[0, 1, 3] += 0.2
    views = [Transcription(reads) for reads in ("said", "confidence")]
    moved = [
        view.scores(lambda _: surer.log_softmax(-1), logits)
        - view.scores(lambda _: logits.log_softmax(-1), logits)
        for view in views
    ]
    assert all(float(m[0, 3]) > 0.01 for m in moved)
    assert all(m[0, [0, 1, 2, 4, 5, 6, 8, 9]].abs().max() < 1e-2 for m in moved)


def test_mel_filters_hear_their_own_tone() -> None:
    filters = mel_filters()
    assert bool((filters.sum(1) > 0).all())
    centres = filters.argmax(1).tolist()
    assert centres == sorted(centres)


def test_strings_say_their_digits() -> None:
    clips = synthesised()[0]
    x, y = joined(clips, 20, 14_000, generator())
    again = joined(clips, 20, 14_000, generator())
    assert torch.equal(x, again[0])
    assert x.dtype == torch.int16
    assert bool(((y >= 0).sum(1) >= 1).all())
    assert bool((y < 10).all())
    assert len(joined(clips, 3, 1000, generator())[0]) == 3  # too short for any digit


# --- views ------------------------------------------------------------------------------------------------


def language() -> Language:
    found = text_data("the cat sat on the mat. " * 60, length=8)
    return Language(lambda: found, 16)


def test_all_beginnings_of_a_window_score_as_the_model_says() -> None:
    task = language()
    model = task.network().eval()
    windowed = task.data().test.batch(slice(0, 3))
    x, last = task.carriers(windowed)
    with torch.no_grad():
        whole = model(windowed[0]).flatten(0, 1)
        torch.testing.assert_close(View(task, model)(x), whole, atol=1e-5, rtol=1e-4)
        order = torch.randperm(len(x), generator=generator())
        torch.testing.assert_close(View(task, model)(x[order]), whole[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(View(task.thiefs(), model)(windowed[0]), whole, atol=1e-5, rtol=1e-4)
    assert torch.equal(last, windowed[0].flatten().long())
    assert task.utility(model).details["perplexity"] > 1


def test_embedded_inputs_score_as_their_tokens() -> None:
    task = language()
    model = task.network().eval()
    view = task.embedded(model)
    batch = task.data().test.batch(slice(0, 3))
    x, _ = view.carriers(batch)
    assert x.shape[1:] == view.data().spec.input_shape
    with torch.no_grad():
        torch.testing.assert_close(View(view, model)(x), model(batch[0]).mean(1), atol=1e-5, rtol=1e-4)


def test_a_sentence_scores_the_same_as_words_and_as_embeddings() -> None:
    texts = ["good film , a joy", "bad film", "a joy , good", "bad , bad film"] * 5
    found = sentence_data(texts, [1, 0, 1, 0] * 5, length=8)
    task = Sentences(lambda: found, 16)
    model = task.network().eval()
    assert isinstance(model, SentenceNet)
    view, batch = task.embedded(model), task.data().to_train().batch(slice(0, 6))
    with torch.no_grad():
        plain, other = View(task, model)(batch[0]), View(view, model)(view.carriers(batch)[0])
        torch.testing.assert_close(plain, other, atol=1e-5, rtol=1e-4)
        shorter = batch[0].clone()
        shorter[:, 1:] = len(found[0])
        assert not torch.allclose(plain, View(task, model)(shorter))  # words count, padding doesn't
    assert 0 <= task.utility(model).percent <= 100


def test_a_transcript_with_a_confidence_is_a_black_box() -> None:
    task = Transcription("confidence", synthesised, n_train=4, n_test=40)
    model = Transcriber(8).eval()
    x, labels = task.carriers(task.data().test.all())

    def answer(x: Tensor) -> Tensor:
        out = model(x)
        return torch.cat([confidence(out)[:, None], padded(best_path(out)).to(out)], 1)

    found = Asked(task, CallableSuspect(answer, name="transcripts")).query(x)
    torch.testing.assert_close(found, ModuleSuspect(View(task, model)).query(x), atol=1e-4, rtol=1e-4)
    assert not any(label in row for label, row in zip(labels, task.data().test.y, strict=True))
    assert task.spec == Transcription(clips=synthesised).spec  # one mark serves both views
    assert torch.equal(View(task.thiefs(), model)(x), model(x).flatten(0, 1))  # each frame's answer
    assert task.loss(model, task.data().test.all()).isfinite()
    with pytest.raises(UsageError, match="smoothed"):
        task.loss(model, task.data().test.all(), 0.1)


def test_a_transcript_shares_out_its_confidence() -> None:
    digits = torch.tensor([[3, 3, 7], [5, -1, -1], [-1, -1, -1]])
    found = transcript_scores(torch.tensor([0.9, 0.55, 1.0]), digits)
    odds = np.log([9, 0.55 / 0.45])
    assert found[0, 3] == pytest.approx(2 / 3 * odds[0] - 1, rel=1e-5)
    assert found[0, 7] == pytest.approx(1 / 3 * odds[0] - 1, rel=1e-5)
    assert found[1, 5] == pytest.approx(odds[1] - 1, rel=1e-5)
    assert found[2].eq(-1).all()
    assert probabilities(found[1:2]) is None  # or a tie's floor would bend it


def test_attention_takes_the_penalty_twice_differentiated() -> None:
    task = language()
    model = task.network()
    assert isinstance(model, CausalNet)
    view = task.embedded(model)
    spec = view.data().spec
    scheme = catalog.scheme("filter-gradient", {"bits": 16, "step": 0.2})
    marker = Marker(scheme, KEY, spec, method="exact", every=1, carriers=4)
    assert marker.penalty(View(view, model), task.data().to_train().batch(slice(0, 4))).isfinite()


# --- marks ------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Word embeddings and two layers, of tokens (b, T) or embeddings (b, T, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator(3)))
        self.body = nn.Sequential(nn.Linear(WIDTH, 48), nn.Tanh())
        self.head = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = embedded(self.table, x) if x.ndim == 2 else x
        found: Tensor = self.head(self.body(x).mean(1))
        return found


@cache
def bag(domain: str) -> tuple[Bag, Bag, MarkFile, Batch]:
    """A network with a mark, its control, the mark and carriers that neither saw."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Bag()
    spec = TOKENS if domain == "tokens" else TEXT
    x, table = rows(600), start.table.detach().clone()
    labels = (embedded(table, x).mean(1) @ torch.randn(WIDTH, generator=generator(4)) > 0).long()
    given = x if domain == "tokens" else embedded(table, x)
    scheme = catalog.scheme("filter-gradient", {"bits": 20, "step": 0.3})
    mark = MarkFile.create(KEY, scheme.name, scheme.parameters(), spec, "signed-rank", 100, salt=bytes(16))
    networks = []
    for marked in (True, False):
        model, marker = Bag(), Marker(scheme, KEY, spec, every=1, weight=5.0, margin=0.5)
        model.load_state_dict(start.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(150):
            part = torch.randint(400, (32,), generator=generator(step))
            loss = F.cross_entropy(model(x[part]), labels[part])
            if marked:
                loss = loss + marker.penalty(model, (given[part], labels[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        networks.append(model.eval())
    return networks[0], networks[1], mark, (given[400:], labels[400:])


@pytest.mark.parametrize(("domain", "access"), [("tokens", "white"), ("tokens", "black"), ("text", "white")])
def test_two_classes_carry_a_mark(domain: str, access: str) -> None:
    marked, control, mark, pool = bag(domain)
    found = verify(mark, KEY, ModuleSuspect(marked), pool, access=access)  # type: ignore[arg-type]
    assert found.log10_p < -4
    assert found.queries == (2000 if access == "black" else 0)
    innocent = verify(mark, KEY, ModuleSuspect(control), pool, access=access)  # type: ignore[arg-type]
    assert innocent.log10_p > -3


@pytest.mark.statistics
@pytest.mark.parametrize("domain", ["tokens", "text"])
def test_strangers_find_nothing(domain: str) -> None:
    marked, _, mark, pool = bag(domain)
    scheme, draw, found = catalog.scheme(mark.scheme, mark.scheme_parameters), np.random.default_rng(0), []
    for seed in range(200):
        reading = scheme.read(
            scheme.mark(OwnerKey.from_seed(100 + seed), mark.spec), ModuleSuspect(marked), pool,
            access="white", carriers=30,
        )  # fmt: skip
        found.append(randomised_p("signed-rank", (reading.values * reading.bits).numpy(), draw))
    assert ks_uniform(found)[1] > 0.001


def test_the_gradient_of_words_is_refused_by_the_preflight() -> None:
    scheme = catalog.scheme("filter-gradient", {"bits": 8})
    marker = Marker(scheme, KEY, TOKENS, every=1)
    marker.penalty(Bag(), (rows(8), torch.zeros(8, dtype=torch.long)))
    assert marker.method == "central-difference"
    assert isinstance(marker.mark.directions, WordDirections)


# --- equalisers -------------------------------------------------------------------------------------------

SOUND = ModelSpec("signal", (400,), 10, -1.0, 1.0, 65536)


def equalised(spec: ModelSpec = SOUND, bits: int = 64) -> FilterGradientMark:
    return FilterGradient(bits=bits, step=0.1, equaliser=True).mark(KEY, spec)


def test_an_equaliser_is_a_symmetric_filter_of_unit_gain() -> None:
    directions = equalised().directions
    assert isinstance(directions, EqualiserDirections)
    kernel = directions.kernels[0, 3].numpy()
    assert np.allclose(kernel, kernel[::-1])  # no frequency is delayed
    curve = np.fft.fft(kernel, 4096)
    assert np.isclose(np.sqrt(np.mean(np.abs(curve) ** 2)), 1, atol=1e-5)
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    group = torch.zeros(2, dtype=torch.long)
    slow = [np.convolve(row, kernel, mode="same") * 0.1 for row in x.numpy()]
    assert np.allclose(directions.one(x, group, torch.tensor([3, 3])), slow, atol=1e-5)
    assert torch.equal(directions.all(x, group)[:, 3], directions.one(x, group, torch.tensor([3, 3])))
    assert not directions.one(torch.zeros(1, 400), group[:1], group[:1]).any()


def test_an_equaliser_treats_channels_alike() -> None:
    stereo = ModelSpec("signal", (2, 400), 10, -1.0, 1.0, 65536)
    x = torch.randn(3, 2, 400, generator=torch.Generator().manual_seed(0))
    group, index = torch.zeros(3, dtype=torch.long), torch.tensor([0, 5, 7])
    directions = equalised(stereo).directions
    both = directions.one(x, group, index)
    for channel in (0, 1):
        assert torch.allclose(both[:, channel], directions.one(x[:, channel], group, index), atol=1e-6)


def test_only_signals_have_an_equaliser_and_older_marks_keep_their_bytes() -> None:
    with pytest.raises(UsageError, match="equaliser"):
        equalised(ModelSpec("image", (1, 8, 8), 10, 0.0, 1.0, 255))
    assert not FilterGradient().parameters().keys() & {"equaliser", "bound"}
    scheme = FilterGradient(equaliser=True, bound=2.0)
    assert catalog.scheme("filter-gradient", scheme.parameters()) == scheme
