"""Finding objects by name, and what their source says of them, without importing torch: registries, lazy names."""
