"""Speed of patched models (`prefill.py`) and pipelines (`video.py`) against dense ones, in one
process: `accelkit bench`.
"""
