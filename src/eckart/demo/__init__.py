"""The bundled model, and what `eckart demo` shows with it: offline, on the source of Python's standard library."""
