"""The core's own plugin: schedulers, the allocator and the executor of this machine."""
