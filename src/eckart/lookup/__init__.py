"""Objects by name and what their source says, without importing torch; what a refused value should have been."""
