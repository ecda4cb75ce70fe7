"""Softmax losses whose gradient is designed: derivative manipulation, fused, for very many classes.

`dm_loss` and the module `DMLoss` take logits, `linear_dm_loss` and `LinearDMLoss` the last layer's input and weight, so that
the logits never exist all at once. `edf` has the weights w(p), `schedules` ramps of their parameters, `emphasis_report` says
where a batch's emphasis went, `margin` is the operator underneath, and `reference` is the definition in plain torch::

    >>> import torch
    >>> from fused_dm import DMLoss
    >>> criterion = DMLoss("dm:beta=8,lambd=0.5")
    >>> criterion(torch.randn(4, 10, requires_grad=True), torch.arange(4)).backward()
"""

from . import edf as edf
from . import reference as reference
from . import schedules as schedules
from ._api import DMLoss as DMLoss
from ._api import DMOutput as DMOutput
from ._api import available_impls as available_impls
from ._api import dm_loss as dm_loss
from ._api import margin as margin
from ._environment import environment_report as environment_report
from ._linear import LinearDMLoss as LinearDMLoss
from ._linear import LinearDMOutput as LinearDMOutput
from ._linear import linear_dm_loss as linear_dm_loss
from ._report import EmphasisReport as EmphasisReport
from ._report import emphasis_report as emphasis_report

__all__ = [
    "DMLoss",
    "DMOutput",
    "EmphasisReport",
    "LinearDMLoss",
    "LinearDMOutput",
    "available_impls",
    "dm_loss",
    "edf",
    "emphasis_report",
    "environment_report",
    "linear_dm_loss",
    "margin",
    "reference",
    "schedules",
]
__version__ = "0.1.0"
