"""kling_jax: open video generation research in JAX, from raw footage to a sampled, scored, predicted Video DiT."""

__version__ = "0.1.0"
