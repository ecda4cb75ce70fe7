"""Emphasis density functions (EDFs): how much an example counts, as a function of its label's probability.

An EDF is the L1 norm w(p) of one example's gradient with respect to its logits (Wang et al., Derivative Manipulation for
General Example Weighting, arXiv 1905.11233). Each class here is a frozen value object: hashable, comparable, printable,
and readable from text::

    >>> from fused_dm import edf
    >>> edf.parse("dm:beta=8,lambd=0.5")
    DM(beta=8.0, lambd=0.5)
    >>> str(edf.GCE(q=0.7))
    'gce:q=0.7'
    >>> str(0.1 * edf.CCE() + 4 * edf.MAE())
    '0.1*cce+4*mae'
    >>> round(edf.DM(beta=8, lambd=0.5).integral, 4)
    11.4082
"""

from ._check import Report as Report
from ._check import check as check
from ._custom import register as register
from ._density import EDF as EDF
from ._density import Composition as Composition
from ._density import Floored as Floored
from ._density import Product as Product
from ._density import Scaled as Scaled
from ._density import Sum as Sum
from ._density import Truncated as Truncated
from ._designed import DM as DM
from ._designed import IMAE as IMAE
from ._designed import Beta as Beta
from ._designed import Exponential as Exponential
from ._designed import Normal as Normal
from ._designed import Uniform as Uniform
from ._draw import plot as plot
from ._forms import FAMILIES as FAMILIES
from ._forms import Family as Family
from ._losses import AEL as AEL
from ._losses import AGCE as AGCE
from ._losses import AUL as AUL
from ._losses import CCE as CCE
from ._losses import DFT as DFT
from ._losses import GCE as GCE
from ._losses import JS as JS
from ._losses import MAE as MAE
from ._losses import MSE as MSE
from ._losses import SCE as SCE
from ._losses import Focal as Focal
from ._losses import PHuberCE as PHuberCE
from ._losses import Poly1 as Poly1
from ._losses import SelfPaced as SelfPaced
from ._losses import SelfPacedLinear as SelfPacedLinear
from ._losses import TaylorCE as TaylorCE
from ._losses import TruncatedGCE as TruncatedGCE
from ._names import known_names as known_names
from ._names import name_kind as _name_kind
from ._names import parse as parse

CATALOGUE: tuple[type[EDF], ...] = (
    DM,
    Exponential,
    Normal,
    Beta,
    Uniform,
    IMAE,
    CCE,
    MAE,
    MSE,
    GCE,
    TruncatedGCE,
    DFT,
    Focal,
    SCE,
    TaylorCE,
    Poly1,
    PHuberCE,
    AUL,
    AGCE,
    AEL,
    JS,
    SelfPaced,
    SelfPacedLinear,
)
for _kind in CATALOGUE:
    _name_kind(_kind)
