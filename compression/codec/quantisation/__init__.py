"""Values to lattice integers and back: rounding, and the step that meets an error or a rate."""

from .lattice import dequantise, quantise
from .rates import step_for_bits
from .scales import RelativeTo, spread
from .steps import relative_error, step_for_error
from .stochastic import quantise_stochastically

__all__ = [
    "RelativeTo",
    "dequantise",
    "quantise",
    "quantise_stochastically",
    "relative_error",
    "spread",
    "step_for_bits",
    "step_for_error",
]
