"""Tasks with known answers, and how close a patched model is to the dense one. `tasks.py` makes
prompts, `quality.py` measures errors against dense, for calibration too; `evaluate.py` is
`accelkit eval`.
"""
