"""peft: adapters carry the mark like any other weights; here is what is left of it after merging.

A ``PeftModel`` goes into ``marker.penalty`` as it is: only weights that require a gradient are pushed.
"""

from __future__ import annotations

import copy

from torch import nn

from gradmark.errors import ModelError, UsageError
from gradmark.suspects.checks import brief

try:
    from peft import PeftModel
except ImportError as cause:
    raise UsageError("Adapters need peft", fix="pip install 'gradmark[peft]'") from cause


def merged(model: nn.Module) -> nn.Module:
    """A plain copy of ``model`` with its adapters merged into the weights: what is shipped and verified.

    Raises UsageError where ``model`` is no PeftModel, ModelError where its adapters can't be merged.
    """
    if not isinstance(model, PeftModel):
        raise UsageError("Nothing to merge", expected="a PeftModel", found=type(model).__name__)
    try:
        plain: nn.Module = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    except Exception as cause:  # each kind of adapter refuses in its own way
        raise ModelError(
            "The adapters can't be merged", found=brief(cause), fix="Ship the adapters beside the model"
        ) from cause
    return plain
