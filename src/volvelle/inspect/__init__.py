"""Look inside a module or a process."""
