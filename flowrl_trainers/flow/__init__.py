"""The mathematics of flow matching as pure functions on tensors.

One convention for time: sigma is the noise level, 1 for noise and 0 for data,

    x = (1 - sigma) data + sigma noise,    velocity = dx/dsigma = noise - data.

Papers that run t from noise to data are converted by t = 1 - sigma and v_paper = -velocity.
"""

from .adjoint import carry_adjoint, vector_jacobian_product
from .advantages import advantage_weights, compare_within_groups, explained_variance, shape_rewards, step_advantages
from .control_costs import best_control, best_rms, control_cost, control_cost_gradient, root_mean_square
from .conversions import clean_estimate, expand_like, interpolate, noise_estimate, velocity_between
from .dynamics import Dynamics, MemorylessDynamics, OdeDynamics
from .lengths import norm_ratios
from .sigmas import shift_sigmas, uniform_sigmas
from .steps import euler_step, euler_steps, flow_grpo_step, log_probability, precise_step, renoise

__all__ = [
    "Dynamics",
    "MemorylessDynamics",
    "OdeDynamics",
    "advantage_weights",
    "best_control",
    "best_rms",
    "carry_adjoint",
    "clean_estimate",
    "compare_within_groups",
    "control_cost",
    "control_cost_gradient",
    "euler_step",
    "euler_steps",
    "expand_like",
    "explained_variance",
    "flow_grpo_step",
    "interpolate",
    "log_probability",
    "noise_estimate",
    "norm_ratios",
    "precise_step",
    "renoise",
    "root_mean_square",
    "shape_rewards",
    "shift_sigmas",
    "step_advantages",
    "uniform_sigmas",
    "vector_jacobian_product",
    "velocity_between",
]
