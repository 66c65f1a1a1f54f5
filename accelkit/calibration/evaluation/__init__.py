"""Tasks with known answers, and how close a patched model is to the dense one."""
