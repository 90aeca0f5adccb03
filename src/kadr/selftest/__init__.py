"""`kadr selftest`: looks for faults of a model, its files and this device, stage by stage, by figures with limits."""
