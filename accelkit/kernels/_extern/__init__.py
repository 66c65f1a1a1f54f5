"""Kernels of other projects behind `attend`; each is optional and none is needed."""
