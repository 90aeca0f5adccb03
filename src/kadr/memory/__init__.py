"""What holds modules in memory: the device, the cache of modules, block swapping."""
