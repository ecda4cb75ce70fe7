"""Triton kernels of fused_dm: device code only."""

from .densities import FAMILIES as FAMILIES
from .examples import divisor_kernel as divisor_kernel
from .examples import received_kernel as received_kernel
from .forward import batch_kernel as batch_kernel
from .forward import forward_kernel as forward_kernel
from .forward import margin_kernel as margin_kernel
from .forward import split_kernel as split_kernel
from .fused import fused_blocks_kernel as fused_blocks_kernel
from .fused import fused_kernel as fused_kernel
from .gradient import gradient_kernel as gradient_kernel
from .gradient import multiply_kernel as multiply_kernel
from .reduction import totals_kernel as totals_kernel
