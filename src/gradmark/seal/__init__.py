"""Tamper evidence: has this model been changed since its owner sealed it?

A seal holds two things. Its *manifest* has a digest and a small summary of every tensor, for a suspect whose
weights are at hand. Its *probes* are inputs at which the scores stand on a knife's edge (sensitive-sample
fingerprinting, He, Zhang and Lee, CVPR 2019), for a suspect that only answers. An Ed25519 key derived
from the owner's signs it all. A seal says nothing of who owns a model; :mod:`gradmark.verify` does.
"""

from gradmark.seal.access import check_suspect
from gradmark.seal.check import Checked, SealOutcome, check
from gradmark.seal.codec import SealFile
from gradmark.seal.make import make_seal

__all__ = ["Checked", "SealFile", "SealOutcome", "check", "check_suspect", "make_seal"]
