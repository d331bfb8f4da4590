"""How long models and their layers take on this device: times, profiles, benchmarks."""
