"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in JAX and Flax.

Importing this package imports neither JAX nor Flax: a config is checked before either is paid for.
"""
