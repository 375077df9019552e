"""How the promises and costs of the pool are measured: `make bench`."""
