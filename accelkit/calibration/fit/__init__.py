"""Measures kernels, estimators and methods on the device at hand; fits the cost table."""
