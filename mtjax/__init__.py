"""Multi-task pretraining of text-to-text models in JAX."""
