"""Models against each other on this machine: time, memory, size, and which factors pay."""
