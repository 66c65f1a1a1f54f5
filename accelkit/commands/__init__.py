"""One file a command: it reads its options, calls the floors below and prints. Results go to
stdout, the rest to stderr; heavy libraries load inside the commands.
"""
