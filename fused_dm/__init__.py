"""Softmax losses whose gradient is designed: derivative manipulation, fused, for very many classes."""

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
