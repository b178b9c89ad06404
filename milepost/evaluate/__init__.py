"""Measure a model: the likelihood of a text, accuracy on benchmarks, and whether two models differ significantly."""
