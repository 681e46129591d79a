"""Where the training runs: devices, replicas, hosts."""
