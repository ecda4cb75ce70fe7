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

from ._catalogue import CATALOGUE as CATALOGUE
from ._catalogue import CCE as CCE
from ._catalogue import DM as DM
from ._catalogue import GCE as GCE
from ._catalogue import IMAE as IMAE
from ._catalogue import MAE as MAE
from ._catalogue import Exponential as Exponential
from ._catalogue import Uniform as Uniform
from ._density import EDF as EDF
from ._density import Composition as Composition
from ._density import Family as Family
from ._density import Floored as Floored
from ._density import Product as Product
from ._density import Scaled as Scaled
from ._density import Sum as Sum
from ._density import Truncated as Truncated
from ._names import known_names as known_names
from ._names import name_kind as _name_kind
from ._names import parse as parse

for _kind in CATALOGUE:
    _name_kind(_kind)
