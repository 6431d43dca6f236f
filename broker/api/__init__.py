"""HTTP: routes, strict schemas, listeners, and the one table of problems."""
