"""Can the mark be found by somebody without the key, and does it harm the model?

:func:`audit` compares a marked model with its unmarked control; one file for each part: ``weights`` and
``gradients`` (white-box), ``queries`` (black-box), ``effects`` and ``robust`` (side effects).
``population`` judges detectors on many networks.
"""

from gradmark.audit.effects import Effect
from gradmark.audit.measure import Detector, Interval, auc_interval
from gradmark.audit.page import audit_report
from gradmark.audit.run import Audit, audit

__all__ = ["Audit", "Detector", "Effect", "Interval", "auc_interval", "audit", "audit_report"]
