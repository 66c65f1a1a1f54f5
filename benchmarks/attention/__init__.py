"""What the benchmarks of attention kernels share."""
