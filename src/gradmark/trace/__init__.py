"""Which licensee's copy is it? Copies of one marked model, each with bits of its own, and who leaked one.

:func:`create` makes the tracing mark that all copies of a model share, :func:`copying` rides in a copy's
short fine-tune, and :func:`trace` names the licensees whose copies are in a suspect.
"""

from gradmark.trace.codebook import Codebook, Fingerprint, tracing_key
from gradmark.trace.copying import Copying, copying
from gradmark.trace.licensees import checked, read_licensees
from gradmark.trace.marks import Tracing, create, default_probes, open_tracing
from gradmark.trace.ranking import rank
from gradmark.trace.tracing import Named, Trace, trace

__all__ = [
    "Codebook",
    "Copying",
    "Fingerprint",
    "Named",
    "Trace",
    "Tracing",
    "checked",
    "copying",
    "create",
    "default_probes",
    "open_tracing",
    "rank",
    "read_licensees",
    "trace",
    "tracing_key",
]
