"""What training carriers read, bit by bit, while a mark goes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradmark.errors import ResumeError
from gradmark.files import sha256
from gradmark.protocols import TestName
from gradmark.reference import natural
from gradmark.stats import TestResult, run_tests

_LONGEST = 50.0  # readings of a bit that its running mean looks back on


class Evidence:
    """Running means (n,) of every bit's reading times the bit, over as many inputs as a verification uses."""

    def __init__(self, mark: Any) -> None:
        n = len(mark.bits)
        self.mark = mark
        self.sizes: tuple[int, ...] = getattr(mark, "sizes", (n,))
        self.limits: Tensor = getattr(mark, "limits", torch.ones(n, dtype=torch.float64))
        self.readings, self.seen = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)

    def watch(self, signed: Tensor, index: Tensor) -> None:
        """Take in readings of bits ``index``; an index beyond the last bit is nobody's."""
        n = len(self.readings)
        real = index.flatten().cpu() < n
        flat, values = index.flatten().cpu()[real], signed.flatten().double().cpu()[real]
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, flat, values)
        count = torch.zeros(n, dtype=torch.float64).index_add_(
            0, flat, torch.ones(len(flat), dtype=torch.float64)
        )
        self.seen = (self.seen + count).clamp_max(_LONGEST)
        share = count / self.seen.clamp_min(1.0)
        fresh = total / count.clamp_min(1.0)
        self.readings += share.clamp_max(1.0) * (fresh - self.readings)

    def natural(self) -> Tensor:
        """The part (n,) of the readings that an unmarked network reads too."""
        known = getattr(self.mark, "reference", None)
        if known is None:
            return torch.zeros_like(self.readings)
        bits = self.mark.bits.double().cpu()
        references = known if isinstance(known, tuple) else (known,)
        rows = zip((self.readings * bits).split(self.sizes), references, strict=True)
        found = [torch.zeros_like(r) if n is None else natural(r, n) for r, n in rows]
        expected: Tensor = torch.cat(found) * bits
        return expected

    def beyond(self) -> Tensor:
        """The readings (n,) less what is natural."""
        return self.readings - self.natural()

    def short(self, margin: float, other: Evidence | None = None) -> Tensor:
        """By what share (n,) of its own margin each bit falls short, or its mean with the other reading."""
        readings = self.beyond() if other is None else (self.beyond() + other.beyond()) / 2
        return (1 - readings / (margin * self.limits)).clamp(0, 1)

    def result(self, test: TestName) -> TestResult:
        """The test on the bits that were seen."""
        seen = self.seen > 0
        return run_tests(
            test, self.beyond()[seen].numpy(), tuple(int(p.sum()) for p in seen.split(self.sizes))
        )

    @property
    def whose(self) -> str:
        """A digest of the bits, by which a resumed run knows that they are the same."""
        bits = self.mark.bits.cpu().to(torch.int8).numpy().tobytes()
        return sha256(bits)

    def state(self, suffix: str = "") -> dict[str, Tensor]:
        return {f"readings{suffix}": self.readings.clone(), f"seen{suffix}": self.seen.clone()}

    def load(self, state: dict[str, Any], suffix: str = "") -> None:
        """ResumeError where ``state`` is of other bits."""
        if state.get("whose", self.whose) != self.whose:
            raise ResumeError(
                "The marker's state is of another mark", expected="key, scheme and parameters as before",
                found="other bits", fix="make the scheme from the mark file that was saved at first",
            )  # fmt: skip
        self.readings, self.seen = state[f"readings{suffix}"].clone(), state[f"seen{suffix}"].clone()
