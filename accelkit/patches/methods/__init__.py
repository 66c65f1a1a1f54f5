"""One file a method; the folder is the registry. See `accelkit.patches.method.load`."""
