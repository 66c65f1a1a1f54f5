"""One prompt, dense and patched side by side: `accelkit patch`. `answers.py` for language models,
`videos.py` for pipelines.
"""
