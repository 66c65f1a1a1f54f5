"""Calibration of diffusers pipelines, by site and share of the denoising steps."""
