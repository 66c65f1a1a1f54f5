"""Speed of patched models and pipelines against dense ones, in one process."""
