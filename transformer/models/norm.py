"""LayerNorm and RMSNorm, with a gradient written by hand.

x [..., D], D the width.
Attribute names are part of the checkpoint format.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.config import ModelConfig
from transformer.distributed import platform as platforms
from transformer.models.params import make_bias, make_param


class Norm(nnx.Module):
    """The norm of `model.norm_type` over a width: a learned scale, and in LayerNorm a bias if `use_bias`."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs, use_bias: bool = True):
        self.norm_type, self.epsilon = config.norm_type, config.norm_epsilon
        self.scale = make_param(rngs, jax.nn.initializers.ones, (width,), ("norm",))
        self.bias = make_bias(use_bias and config.use_bias and config.norm_type == "layer", rngs, width)

    def __call__(self, x: Array) -> Array:
        bias_D = None if self.bias is None else self.bias[...]
        return normalize(x, self.scale[...], bias_D, self.norm_type, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: Array, scale_D: Array, bias_D: Array | None, norm_type: str, epsilon: float) -> Array:
    """LayerNorm or RMSNorm over the last axis, computed in float32.

    layer: (x - mean) / √(variance + ε) · scale + bias (Ba et al. 2016); rms: x / √(mean of x² + ε) · scale (Zhang &
    Sennrich 2019). The gradient is written by hand: XLA's CPU back end compiles that of autodiff badly, and others
    would take mean and deviation twice.
    """
    return _normalize_forward(x, scale_D, bias_D, norm_type, epsilon)[0]


def _mean(x: Array, norm_type: str) -> Array | None:
    """The mean that the norm subtracts; RMSNorm has none."""
    return x.mean(-1, keepdims=True) if norm_type == "layer" else None


def _centre(x: Array, mean: Array | None) -> Array:
    return x if mean is None else x - mean


def _normalize_forward(
    x: Array, scale_D: Array, bias_D: Array | None, norm_type: str, epsilon: float
) -> tuple[Array, tuple]:
    x_f32 = x.astype(jnp.float32)
    mean = _mean(x_f32, norm_type)
    centred = _centre(x_f32, mean)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    normed = centred * inverse
    out = normed * jnp.broadcast_to(scale_D, x.shape)
    out = out if bias_D is None else out + jnp.broadcast_to(bias_D, x.shape)
    saved = (normed, None, None) if platforms.norm_saves_normed() else (None, x, mean)
    return out.astype(x.dtype), (*saved, inverse, scale_D, bias_D)


def _normalize_backward(
    norm_type: str, epsilon: float, residuals: tuple, grad: Array
) -> tuple[Array, Array, Array | None]:
    """With g = dy · scale and x̂ the normed input, dx = (g - mean of g - x̂ · mean of g x̂) / √(variance + ε).

    RMSNorm subtracts no mean of g.
    """
    normed, x, mean, inverse, scale_D, bias_D = residuals
    if normed is None:
        x, mean, inverse = jax.lax.optimization_barrier((x, mean, inverse))
        normed = _centre(x.astype(jnp.float32), mean) * inverse
    grad_f32 = grad.astype(jnp.float32)
    leading = tuple(range(grad.ndim - 1))
    scaled = grad_f32 * jnp.broadcast_to(scale_D, grad.shape)
    projection = (scaled * normed).mean(-1, keepdims=True)
    grad_x = (inverse * (_centre(scaled, _mean(scaled, norm_type)) - normed * projection)).astype(grad.dtype)
    grad_scale_D = (grad_f32 * normed).sum(leading)
    return grad_x, grad_scale_D, None if bias_D is None else grad_f32.sum(leading)


normalize.defvjp(_normalize_forward, _normalize_backward)
