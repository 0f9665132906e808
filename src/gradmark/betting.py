"""Bets on secret fair coins: a test martingale, valid at whatever moment the betting stops.

Someone who says that a suspect carries the mark should be able to win money on it. A bettor starts
with one unit, and before a bit is looked at, stakes on its value at fair odds: from the suspect's
answers alone, and the bits looked at before, it states a probability ``q`` that the bit is +1, and
its wealth is multiplied by ``2 q`` or ``2 (1 - q)``. If the suspect was made without the key, the
bits not yet looked at are fair coins whatever the suspect answered, so no way to bet makes the
wealth grow: its expected value is 1 at any stopping time, and it reaches ``1 / alpha`` with a
probability of at most ``alpha`` (Ville's inequality). How ``q`` is found can only cost evidence,
never validity. See Shafer (2021), and Waudby-Smith and Ramdas (2023).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

_SIGNALS = (0.1, 0.2, 0.4, 0.8, 1.6)
_NATURAL = (0.0, 0.15, 0.4, 1.0, 2.0)
_SURE = 0.01  # no expert stakes more than 1 - 2 x this: one surprise must not ruin it
_DOUBT = 0.2  # weight, to begin with, of the expert that never bets
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)


class Bettor:
    """Bets on bits by a weighted vote of experts, who are believed as they win: ``log_wealth`` in nats.

    An expert believes that a reading, in units of the noise of one observation, is ``s b + t g +
    sqrt(noise) g'``: the mark's signal ``s`` times the bit ``b``, what an unmarked network reads there
    (of standard deviation ``t``), and the noise that averaging leaves, with Gaussian ``g``, ``g'``.
    The vote is the Bayes mixture, so the wealth is the weighted mean of what the experts alone
    would have (Cover's universal portfolio), and misses the best of them by a constant factor.
    """

    def __init__(self) -> None:
        grid = [(s, t) for s in _SIGNALS for t in _NATURAL]
        self._s = np.array([0.0, *(s for s, _ in grid)])
        self._t2 = np.array([1.0, *(t * t for _, t in grid)])
        prior = np.full(len(self._s), (1 - _DOUBT) / len(grid))
        prior[0] = _DOUBT
        self._log_weights: Array = np.log(prior)
        self.log_wealth = 0.0
        self.bets = 0

    def predict(self, readings: Array, noise: Array) -> Array:
        """P(bit is +1) for readings (n,) with noise variances (n,); exactly 1/2 for a reading of zero."""
        return self.believe(self.opinions(readings, noise))

    def believe(self, opinions: Array) -> Array:
        """The vote (n,) of the experts' ``opinions`` (experts, n), by what each has won so far."""
        weights = np.exp(self._log_weights - self._log_weights.max())
        mixed: Array = (weights / weights.sum()) @ opinions
        return mixed

    def bet(self, reading: float, noise: float, bit: float) -> float:
        """Stake on one bit, look at it (+1 or -1), and take the gain, in nats; experts gain or lose trust."""
        ups = self.opinions(np.array([reading]), np.array([noise]))[:, 0]
        factors = np.log(2 * (ups if bit > 0 else 1 - ups))
        gain = float(special.logsumexp(self._log_weights + factors) - special.logsumexp(self._log_weights))
        self._log_weights += factors
        self.log_wealth += gain
        self.bets += reading != 0
        return gain

    def promise(self, noise: Array) -> Array:
        """Nats (n,) that a bit read with noise variance (n,) is expected to bring, by the vote so far."""
        spread = self._t2[:, None] + np.maximum(noise, 1e-9)
        return self.believe(information(self._s[:, None] ** 2 / spread))

    def opinions(self, readings: Array, noise: Array) -> Array:
        """Each expert's P(bit is +1): (experts, n)."""
        spread = self._t2[:, None] + np.maximum(noise, 1e-3)
        ratio = np.tanh(self._s[:, None] * readings / spread)  # half the log-likelihood ratio
        opinions: Array = 0.5 + (0.5 - _SURE) * ratio
        return opinions


def gain(q: Array) -> Array:
    """Expected nats of a bet (n,) by whoever believes in its q (n,): ln 2 less the entropy."""
    return np.asarray(math.log(2) + special.xlogy(q, q) + special.xlogy(1 - q, 1 - q), dtype=np.float64)


def information(snr: Array) -> Array:
    """Nats that a reading ``b sqrt(snr) + g`` tells of a fair bit b = +1 or -1, g standard normal."""
    x = np.minimum(snr, 60.0)[..., None]
    lost = special.log1p(np.exp(-(2 * x + 2 * np.sqrt(x) * _NODES))) @ _WEIGHTS / _WEIGHTS.sum()
    nats: Array = np.maximum(math.log(2) - lost, 0.0)
    return nats
