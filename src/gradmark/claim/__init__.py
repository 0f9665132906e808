"""Claims: who owns a mark, committed to, signed and dated, so that it stands up later.

:class:`Claim` says it, :class:`ClaimFile` signs it and holds its time stamps, :func:`check_claim` looks for
what could be wrong with it offline, :class:`Opening` discloses the key to a judge. ``docs/claim.md`` says
what each of them proves. A claim holds no secret; an opening does.
"""

from gradmark.claim.check import Check, Checked, check_claim
from gradmark.claim.file import ClaimFile
from gradmark.claim.opening import Opening
from gradmark.claim.pool import pool_digest
from gradmark.claim.statement import ALPHA, Claim, FixedPool, ModelFile, Rule, least_alpha

__all__ = [
    "ALPHA",
    "Check",
    "Checked",
    "Claim",
    "ClaimFile",
    "FixedPool",
    "ModelFile",
    "Opening",
    "Rule",
    "check_claim",
    "least_alpha",
    "pool_digest",
]
